"""`moec sign ARTIFACT --key FILE`."""

from __future__ import annotations

from pathlib import Path

import click

from moec.commands.echo import echo
from moec.commands.options import quiet_option


@click.command("sign", short_help="Sign an artifact, for those who run it.")
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option(
    "--key", type=click.Path(path_type=Path), required=True, metavar="FILE",
    help="An Ed25519 private key, of openssl genpkey or ssh-keygen.",
)  # fmt: skip
@quiet_option
def command(artifact: Path, key: Path, quiet: bool) -> None:
    """Check ARTIFACT as `moec verify` does, and write its signature beside it, as ARTIFACT.sig.

    Whoever has the public key can ask for it: `--signed-by FILE` of verify and run. A key that is
    encrypted is opened with a password, which is asked for. Needs the extra moec[sign].
    """
    from moec.runtime import artifact as artifacts
    from moec.runtime.signature import EncryptedKeyError, sign

    artifacts.read(artifact, native=False).verify()
    try:
        path = sign(artifact, key)
    except EncryptedKeyError:
        password = click.prompt(f"password of {key}", hide_input=True, err=True)
        path = sign(artifact, key, password.encode())
    if not quiet:
        echo(f"wrote {path}")
