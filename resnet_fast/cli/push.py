"""`resnet-fast push`."""

from pathlib import Path
from typing import Annotated

import typer

from resnet_fast.cli.app import command, refusals, stop
from resnet_fast.common.checks import one_line
from resnet_fast.training.paths import find_checkpoint


@command("Upload a trained network to the Hugging Face Hub.", "push runs/digits me/digits-resnet18 --private")
def push(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder or a checkpoint.", show_default=False)],
    repo_id: Annotated[
        str, typer.Argument(metavar="NAME/MODEL", help="Repository; created if it does not exist.", show_default=False)
    ],
    private: Annotated[bool, typer.Option("--private", help="Create the repository as private.")] = False,
) -> None:
    """Upload a trained network to the Hugging Face Hub. Needs the extra `hub` and a login by `hf auth login`."""
    with refusals():
        find_checkpoint(run)
    try:
        from resnet_fast.hub import HubModel
    except ModuleNotFoundError as error:
        stop(1, f"error: {error}")
    from huggingface_hub.utils import validate_repo_id

    from resnet_fast.inference import CheckpointError

    with refusals(CheckpointError):
        validate_repo_id(repo_id)
        model = HubModel.from_run(run)
    try:
        url = model.push_to_hub(repo_id, private=private or None, model_card_kwargs={"repo_id": repo_id})
    except KeyboardInterrupt:
        stop(130, "interrupted")
    except Exception as error:  # including those of the HTTP client, which differ between versions
        stop(1, f"error: {repo_id} was not written: {one_line(error, 300)}")
    print(url)
