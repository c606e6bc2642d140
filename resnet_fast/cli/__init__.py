"""The command line: `resnet-fast train`, `eval`, `predict`, `export`, `push`, `profile`, `convert`, `study`,
`summary`, `tune` and `doctor`, a module each.

Exit codes: 0 done, 1 a run that failed (data not available, loss not finite, disk full), a checkpoint or an image that
cannot be read, or a machine on which something needed is missing or computes wrong, 2 a wrong argument, 130
interrupted, 143 terminated.

A command imports what computes (torch, the networks, matplotlib …) in its function, once its arguments are right, so
that `--help` and refusals answer at once.
"""

from resnet_fast.cli.extra import stop_without

try:
    from resnet_fast.cli import (  # noqa: F401  (each adds its command)
        convert,
        doctor,
        evaluate,
        export,
        predict,
        profile,
        push,
        study,
        summary,
        train,
        tune,
    )
    from resnet_fast.cli.app import app
except ModuleNotFoundError as error:
    stop_without(error)

__all__ = ["app"]
