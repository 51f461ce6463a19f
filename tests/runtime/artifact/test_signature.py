"""Signatures of artifacts: keys of openssl and ssh, changed files, and the signer's key."""

from __future__ import annotations

import base64
import shutil
import sys
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

import moec
from moec.errors import ArtifactError, UsageError
from moec.runtime.artifact import artifact
from moec.runtime.artifact.signature import manifest_content, sign, signature_path
from tests.command_line import invoke
from tests.runtime import toy

GRAPH = """graph main(x: f32[T, 4]) {
  y: f32[T, 4] = aten.relu.default(x)
  return y
}
"""
PEM, SSH = serialization.Encoding.PEM, serialization.Encoding.OpenSSH
PKCS8, OPENSSH = serialization.PrivateFormat.PKCS8, serialization.PrivateFormat.OpenSSH


@pytest.fixture
def model(tmp_path: Path) -> Path:
    artifact.write(toy.package(), tmp_path / "toy.moec", graphs={"main": GRAPH})
    return tmp_path / "toy.moec"


def write_pair(folder: Path, name: str, *, ssh: bool = False, password: bytes = b"") -> Path:
    """Write NAME and NAME.pub; the path of the private key."""
    key, path = ed25519.Ed25519PrivateKey.generate(), folder / name
    hidden = (
        serialization.BestAvailableEncryption(password)
        if password
        else serialization.NoEncryption()
    )
    path.write_bytes(key.private_bytes(PEM, OPENSSH if ssh else PKCS8, hidden))
    kind = serialization.PublicFormat.OpenSSH if ssh else None
    public = key.public_key().public_bytes(
        SSH if ssh else PEM, kind or serialization.PublicFormat.SubjectPublicKeyInfo
    )
    public_path(path).write_bytes(public)
    return path


def sign_artifact(path: Path, key: Path) -> Path:
    return sign(path, manifest_content(path), key)


def public_path(key: Path) -> Path:
    return key.with_name(f"{key.name}.pub")


def run(*words: object, text: str | None = None) -> tuple[int, str, str]:
    result = invoke(*words, input=text)
    return result.exit_code, result.stdout, result.stderr


@pytest.mark.parametrize("ssh", [False, True], ids=["openssl", "ssh"])
def test_signed_and_verified(model: Path, ssh: bool) -> None:
    key = write_pair(model.parent, "key", ssh=ssh)
    code, out, err = run("sign", model, "--key", key)
    assert (code, out, err) == (0, f"wrote {model}.sig\n", "")
    code, out, err = run("verify", model, "--signed-by", public_path(key))
    assert (code, err) == (0, "")
    assert f"is intact and signed with the key in {public_path(key)}: 6 parts" in out
    assert artifact.read(model, native=False, signed_by=public_path(key))


def test_a_folder_is_signed_beside_it(tmp_path: Path) -> None:
    path, key = tmp_path / "toy", write_pair(tmp_path, "key")
    artifact.write(toy.package(), path, graphs={"main": GRAPH}, folder=True)
    assert sign_artifact(path, key) == tmp_path / "toy.sig"
    assert artifact.read(path, native=False, signed_by=public_path(key))


def test_an_encrypted_key_asks_for_its_password(model: Path) -> None:
    key = write_pair(model.parent, "key", password=b"open")
    code, _, err = run("sign", model, "--key", key, text="open\n")
    assert code == 0
    assert f"password of {key}" in err
    assert run("verify", model, "--signed-by", public_path(key))[0] == 0
    code, _, err = run("sign", model, "--key", key, text="shut\n")
    assert code == 1
    assert "has no private key, or the password is wrong" in err


def test_another_artifact_under_the_signature_is_refused_by_every_door(model: Path) -> None:
    key = write_pair(model.parent, "key")
    sign_artifact(model, key)
    artifact.write(
        toy.package(), model, graphs={"main": GRAPH.replace("relu", "tanh")}, tolerance=0.5
    )
    words = f"{model} is not signed with the key in {public_path(key)}: it was changed after"
    for command in (["verify", model], ["run", model, "--check"]):
        code, _, err = run(*command, "--signed-by", public_path(key))
        assert code == 1
        assert words in err
    with pytest.raises(ArtifactError, match="is not signed with the key"):
        moec.load(model, signed_by=public_path(key))


def test_somebody_elses_signature_is_refused(model: Path) -> None:
    sign_artifact(model, write_pair(model.parent, "theirs"))
    private = public_path(write_pair(model.parent, "ours"))
    with pytest.raises(ArtifactError, match="or signed with another key"):
        artifact.read(model, native=False, signed_by=private)


def test_a_part_that_was_changed_is_found_under_a_right_signature(model: Path) -> None:
    key = write_pair(model.parent, "key")
    sign_artifact(model, key)
    weight = toy.package().arrays["b"].tobytes()
    model.write_bytes(model.read_bytes().replace(weight, bytes(len(weight))))
    code, _, err = run("verify", model, "--signed-by", public_path(key))
    assert code == 1
    assert "was altered: its SHA-256 differs" in err


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"moec-ed25519-1 AAAA\n",
        b"moec-ed25519-2 " + base64.b64encode(bytes(64)) + b"\n",
        b"\xff" * 100,
        b"moec-ed25519-1 " + base64.b64encode(bytes(64)) + b"\nmore\n",
    ],
)
def test_a_signature_of_another_form(model: Path, content: bytes) -> None:
    key = write_pair(model.parent, "key")
    signature_path(model).write_bytes(content)
    with pytest.raises(ArtifactError, match=r"toy\.moec\.sig is not a signature made by moec sign"):
        artifact.read(model, native=False, signed_by=public_path(key))


def test_no_signature(model: Path) -> None:
    key = write_pair(model.parent, "key")
    code, _, err = run("verify", model, "--signed-by", public_path(key))
    assert code == 1
    assert f"{model}.sig cannot be read: there is no such file" in err


def test_keys_that_cannot_be_used(model: Path) -> None:
    folder = model.parent
    key = write_pair(folder, "key")
    sign_artifact(model, key)
    (folder / "text").write_text("no key")
    other = ec.generate_private_key(ec.SECP256R1())
    (folder / "ec").write_bytes(
        other.private_bytes(PEM, PKCS8, serialization.NoEncryption()),
    )
    (folder / "ec.pub").write_bytes(
        other.public_key().public_bytes(PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    )
    for name, words in {
        "text": "has no private key; openssl genpkey -algorithm ed25519",
        "ec": "has a key that is not Ed25519",
        "key.pub": "has no private key",
        "gone": "cannot be read: there is no such file",
    }.items():
        with pytest.raises(UsageError, match=words):
            sign_artifact(model, folder / name)
    for name, words in {
        "text": "has no public key",
        "ec.pub": "has a key that is not Ed25519",
        "key": "has a private key: give the author's public key",
        "gone": "cannot be read: there is no such file",
    }.items():
        with pytest.raises(UsageError, match=words):
            artifact.read(model, native=False, signed_by=folder / name)


def test_without_the_library(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key = write_pair(model.parent, "key")
    monkeypatch.setitem(sys.modules, "cryptography", None)
    with pytest.raises(UsageError, match=r"a signature needs cryptography, .*'moec\[sign\]'"):
        sign_artifact(model, key)


def test_what_is_no_artifact_is_not_signed(tmp_path: Path) -> None:
    key = write_pair(tmp_path, "key")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ArtifactError, match=r"has no manifest\.json"):
        sign_artifact(tmp_path / "folder", key)


def test_a_copy_keeps_its_signature(model: Path) -> None:
    key = write_pair(model.parent, "key")
    copy = model.with_name("copy.moec")
    shutil.copy(model, copy)
    shutil.copy(sign_artifact(model, key), signature_path(copy))
    assert artifact.read(copy, native=False, signed_by=public_path(key))
