"""`moec sign ARTIFACT --key FILE`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from moec.commands.execution.ranks import holds_ranks
from moec.commands.options.options import quiet_option
from moec.commands.output.echo import echo

if TYPE_CHECKING:
    from moec.runtime.artifact.part_writers import Buffer


@click.command("sign")
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option(
    "--key", type=click.Path(path_type=Path), required=True, metavar="FILE",
    help="An Ed25519 private key, made by openssl genpkey or ssh-keygen.",
)  # fmt: skip
@quiet_option
def command(artifact: Path, key: Path, quiet: bool) -> None:
    """Check ARTIFACT as `moec verify` does, and write its signature beside it, as ARTIFACT.sig.

    `moec verify` and `moec run` check the signature with --signed-by PUBLIC_KEY. For an encrypted
    private key, the command prompts for the password. Needs the extra moec[sign].
    """
    from moec.runtime.artifact.signature import EncryptedKeyError, sign

    content = verified_manifest(artifact)
    try:
        path = sign(artifact, content, key)
    except EncryptedKeyError:
        password = click.prompt(f"password of {key}", hide_input=True, err=True)
        path = sign(artifact, content, key, password.encode())
    if not quiet:
        echo(f"wrote {path}")


def verified_manifest(path: Path) -> Buffer:
    """The manifest of an artifact or of the ranks of a plan, after verifying all parts. Raises
    ArtifactError."""
    if holds_ranks(path):
        from moec.parallel.store import verify_folder

        return verify_folder(path)[1]
    from moec.runtime.artifact import artifact as artifacts
    from moec.runtime.artifact.signature import manifest_content

    artifacts.read(path, native=False).verify()
    return manifest_content(path)
