"""Downloads the model of a command, where that is an id of the hub, and shows how far it is."""

from __future__ import annotations

from moec import model_path
from moec.commands.output.progress import Progress, hush
from moec.files import hub_files
from moec.report.units import size


def local_model(model: str, revision: str | None, quiet: bool) -> str:
    """The path of a model, whose files are checked and, for an id of the hub, downloaded first.

    Raises MoecError for a model that cannot be read, before torch is imported.
    """
    if model_path.kind_of_model(model) != "hub":
        model_path.check_no_revision(model, revision)
        return model
    hush()  # before huggingface_hub is imported, which imports tqdm
    files = hub_files.find(model, revision)
    if files.missing:
        with Progress(quiet, plan={"download": 1.0}) as progress:
            progress.phase(f"download {size(files.size)} of {model}")
            path = hub_files.download(files, shares=True)
    else:
        path = hub_files.download(files)
    model_path.kind_of_model(str(path))
    return str(path)
