"""The command line: `resnet-fast train`, `eval`, `predict`, `export`, `push`, `profile`, `convert`, `study`,
`summary`, `tune` and `doctor`, one module each.

Exit codes:
    0    success
    1    failure: data not available, loss not finite, disk full, an unreadable checkpoint or image, a closed pipe, or a
         machine that lacks a required package or computes wrong results
    2    a wrong argument
    130  interrupted
    143  terminated

A command imports torch, the networks, matplotlib … inside its function, after checking its arguments, so that `--help`
and refusals answer at once.
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
