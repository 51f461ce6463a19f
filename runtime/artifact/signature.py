"""Signatures of artifacts tell who made a file; its digests tell only that it is undamaged.

A signature is Ed25519 (RFC 8032) of a line of text that names the form and the SHA-256 of the
manifest (`manifest.json`; of the ranks of a plan `ranks.json`), which in turn holds the SHA-256 of
every other part. It is one line of text in `model.moec.sig`, beside the artifact. Keys are those of
`openssl genpkey -algorithm ed25519` and of `ssh-keygen -t ed25519`.
"""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path
from typing import TYPE_CHECKING

from moec.errors import ArtifactError, MoecError, SetupError
from moec.extras import missing_extra
from moec.files.os_errors import reason
from moec.files.regular_file import read_regular, whole_file
from moec.runtime.artifact import manifest
from moec.runtime.artifact.container import open_container
from moec.runtime.artifact.part_writers import Buffer

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import (
        Ed25519PrivateKey,
        Ed25519PublicKey,
    )

_FORM = "moec-ed25519-1"
_LINE = re.compile(rf"{_FORM} ([A-Za-z0-9+/]{{86}}==)\n?")
_LONGEST = 1 << 16  # bytes of a key or a signature
_PAIR = (
    "openssl genpkey -algorithm ed25519 -out key.pem makes one, and "
    "openssl pkey -in key.pem -pubout -out key.pub its public key"
)


class EncryptedKeyError(SetupError):
    """A private key needs a password, and none was given."""


def signature_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.sig")


def manifest_content(path: Path) -> Buffer:
    """What is signed of the artifact at `path`. Raises ArtifactError where it is none."""
    content = open_container(path).get(manifest.NAME)
    if content is None:
        raise ArtifactError(f"{path} is not a moec artifact: it has no {manifest.NAME}")
    return content


def sign(path: Path, content: Buffer, key: Path, password: bytes | None = None) -> Path:
    """Sign the artifact at `path`, whose manifest is `content`, with the private key in the file
    `key`. Returns the signature's path.

    The parts are not hashed here: verify the artifact first. Raises EncryptedKeyError, and
    UsageError where the key cannot be used or the signature cannot be written.
    """
    signature = _private_key(key, password).sign(_message(content))
    target = signature_path(path)
    try:
        with whole_file(target) as file:
            file.write(f"{_FORM} {base64.b64encode(signature).decode()}\n".encode())
    except OSError as error:
        raise SetupError(f"{target} cannot be written: {reason(error)}") from error
    return target


def check_signature(path: Path, content: Buffer, key: Path) -> None:
    """Check the bytes of the manifest that was read from the artifact at `path`.

    Raises ArtifactError unless the signature beside the artifact was made with the private half of
    the public key in the file `key`, and UsageError where that file holds no such key.
    """
    public = _public_key(key)
    from cryptography.exceptions import InvalidSignature

    source = signature_path(path)
    match = _LINE.fullmatch(_read(source, ArtifactError).decode(errors="replace"))
    if match is None:
        raise ArtifactError(f"{source} is not a signature made by moec sign")
    try:
        public.verify(base64.b64decode(match[1]), _message(content))
    except InvalidSignature:
        raise ArtifactError(
            f"{path} is not signed with the key in {key}: it was changed after it was signed, or "
            "signed with another key; do not run it, and ask its author"
        ) from None


def _message(content: Buffer) -> bytes:
    return f"{_FORM} {hashlib.sha256(content).hexdigest()}\n".encode()


def _private_key(path: Path, password: bytes | None) -> Ed25519PrivateKey:
    _require_cryptography()
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    content = _read(path, SetupError)
    openssh = b"BEGIN OPENSSH" in content
    load = serialization.load_ssh_private_key if openssh else serialization.load_pem_private_key
    try:
        key = load(content, password)
    except TypeError:  # one of password and encryption without the other
        if password is None:
            raise EncryptedKeyError(f"{path} is encrypted: its password is needed") from None
        key = load(content, None)
    except UnsupportedAlgorithm as error:
        raise SetupError(f"{path} cannot be opened: {error}") from None
    except ValueError:
        wrong = ", or the password is wrong" if password else ""
        raise SetupError(f"{path} has no private key{wrong}; {_PAIR}") from None
    if not isinstance(key, Ed25519PrivateKey):
        raise SetupError(f"{path} has a key that is not Ed25519; {_PAIR}")
    return key


def _public_key(path: Path) -> Ed25519PublicKey:
    _require_cryptography()
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    content = _read(path, SetupError)
    if b"PRIVATE KEY" in content:
        raise SetupError(f"{path} has a private key: give the author's public key")
    openssh = content.startswith(b"ssh-")
    load = serialization.load_ssh_public_key if openssh else serialization.load_pem_public_key
    try:
        key = load(content)
    except (ValueError, UnsupportedAlgorithm):
        raise SetupError(f"{path} has no public key; {_PAIR}") from None
    if not isinstance(key, Ed25519PublicKey):
        raise SetupError(f"{path} has a key that is not Ed25519; {_PAIR}")
    return key


def _require_cryptography() -> None:
    try:
        import cryptography  # noqa: F401
    except ModuleNotFoundError as error:
        raise SetupError(missing_extra(error)) from None


def _read(path: Path, kind: type[MoecError]) -> bytes:
    try:
        return read_regular(path, _LONGEST)
    except (OSError, ValueError) as error:
        words = reason(error) if isinstance(error, OSError) else str(error)
        raise kind(f"{path} cannot be read: {words}") from None
