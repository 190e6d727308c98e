"""A signature holds for exactly the files that were signed, by exactly the key; model-signing's own command agrees."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import Moec, refused

pytest.importorskip("model_signing", reason="needs the sign extra: pip install 'moec[sign]'")

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

PEM = serialization.Encoding.PEM


def write_keys(folder: Path, key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey, password: bytes = b"") -> None:
    cover = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
    (folder / "key.pem").write_bytes(key.private_bytes(PEM, serialization.PrivateFormat.PKCS8, cover))
    public = key.public_key().public_bytes(PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    (folder / "key.pub").write_bytes(public)


@pytest.fixture
def signed(artifact: Path, tmp_path: Path, moec: Moec) -> Path:
    """An artifact with its signature beside it, and both keys."""
    write_keys(tmp_path, ec.generate_private_key(ec.SECP256R1()))
    folder = tmp_path / "a"
    shutil.copytree(artifact, folder)
    assert moec("sign", folder, "--key", tmp_path / "key.pem") == (0, f"{folder}.sig\n", "")
    return folder


def test_what_was_signed_is_accepted_wherever_it_lies(signed: Path, moec: Moec) -> None:
    key = signed.parent / "key.pub"
    assert moec("verify-signature", signed, "--key", key) == (0, f"{signed}: signed with this key, and unchanged\n", "")
    moved = signed.rename(signed.with_name("elsewhere"))
    status, _, said = moec("verify-signature", moved, "--key", key, "--signature", f"{signed}.sig")
    assert status == 0, said


def change_a_byte(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


CHANGES: dict[str, Callable[[Path], object]] = {
    "program": lambda a: change_a_byte(a / "model.pte"),
    "manifest": lambda a: change_a_byte(a / "manifest.json"),
    "mark": lambda a: (a / ".moec").write_text("{}"),
    "added": lambda a: (a / "more.py").write_text(""),
    "added for git": lambda a: (a / ".gitattributes").write_text(""),
    "added in a folder": lambda a: ((a / ".git").mkdir(), (a / ".git" / "config").write_text("")),
    "an empty folder added": lambda a: (a / "more").mkdir(),
    "removed": lambda a: (a / "tokenizer.json").unlink(),
    "renamed": lambda a: (a / "tokenizer.json").rename(a / "tokenizer.jso"),
    "link": lambda a: (shutil.move(a / "model.pte", a.parent / "m"), (a / "model.pte").symlink_to(a.parent / "m")),
    "pipe": lambda a: os.mkfifo(a / "pipe"),
    "statement": lambda a: reword(a.with_name("a.sig")),
}


def reword(signature: Path) -> None:
    """Another statement under the same signature."""
    import base64

    bundle = json.loads(signature.read_text())
    payload = json.loads(base64.b64decode(bundle["dsseEnvelope"]["payload"]))
    payload["predicate"]["resources"].pop()
    bundle["dsseEnvelope"]["payload"] = base64.b64encode(json.dumps(payload).encode()).decode()
    signature.write_text(json.dumps(bundle))


@pytest.mark.parametrize("change", CHANGES)
def test_every_change_is_found(change: str, signed: Path, moec: Moec) -> None:
    CHANGES[change](signed)
    status, out, said = moec("verify-signature", signed, "--key", signed.parent / "key.pub")
    assert (status, out, said.count("\n")) == (1, "", 1), said
    assert said.startswith(f"{signed}: ")


def test_another_key_is_not_the_signers(signed: Path, moec: Moec) -> None:
    write_keys(signed.parent, ec.generate_private_key(ec.SECP384R1()))
    status, out, said = moec("verify-signature", signed, "--key", signed.parent / "key.pub")
    assert (status, out) == (1, "")
    assert "key" in said


def test_files_that_the_signer_left_out_are_named(signed: Path, moec: Moec) -> None:
    """Somebody signed with model-signing's own command and ignored a file: that is valid there, and not enough here."""
    command = [sys.executable, "-m", "model_signing", "sign", "key", signed, "--signature", f"{signed}.sig"]
    command += ["--private_key", signed.parent / "key.pem", "--ignore-paths", signed / "model.pte"]
    subprocess.run(list(map(str, command)), check=True, capture_output=True)
    status, out, said = moec("verify-signature", signed, "--key", signed.parent / "key.pub")
    assert (status, out, said) == (1, "", f"{signed}: the signature does not cover model.pte\n")


def test_the_packages_own_command_reads_ours(signed: Path) -> None:
    command = [sys.executable, "-m", "model_signing", "verify", "key", str(signed), "--signature", f"{signed}.sig"]
    command += ["--public_key", str(signed.parent / "key.pub")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    change_a_byte(signed / "model.pte")
    assert subprocess.run(command, capture_output=True, check=False).returncode != 0


def test_a_password_is_taken_from_the_environment(signed: Path, moec: Moec, monkeypatch: pytest.MonkeyPatch) -> None:
    write_keys(signed.parent, ec.generate_private_key(ec.SECP521R1()), b"open")
    key = signed.parent / "key.pem"
    refused(moec("sign", signed, "--key", key), str(key), "MOEC_KEY_PASSWORD")
    monkeypatch.setenv("MOEC_KEY_PASSWORD", "wrong")
    refused(moec("sign", signed, "--key", key), str(key), "its password is another")
    monkeypatch.setenv("MOEC_KEY_PASSWORD", "open")
    assert moec("sign", signed, "--key", key)[0] == 0
    assert moec("verify-signature", signed, "--key", signed.parent / "key.pub")[0] == 0


def test_what_is_no_key_is_said(signed: Path, moec: Moec) -> None:
    folder = signed.parent
    refused(moec("sign", signed, "--key", folder / "key.pub"), "is no private key in PEM form")
    refused(moec("verify-signature", signed, "--key", folder / "key.pem"), "is no public key in PEM form")
    refused(moec("sign", signed, "--key", folder / "none"), "cannot be read")
    write_keys(folder, rsa.generate_private_key(65537, 2048))
    refused(moec("sign", signed, "--key", folder / "key.pem"), "is no key on P-256")
    refused(moec("verify-signature", signed, "--key", folder / "key.pub"), "is no key on P-256")
    write_keys(folder, ec.generate_private_key(ec.SECP256K1()))
    refused(moec("sign", signed, "--key", folder / "key.pem"), "is no key on P-256")


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", "null", '{"verificationMaterial": 1}', '{"dsseEnvelope": {"payload": "e30="}}']
)
def test_what_is_no_signature_is_said(text: str, signed: Path, moec: Moec) -> None:
    file = signed.parent / "x.sig"
    file.write_text(text)
    key = signed.parent / "key.pub"
    refused(moec("verify-signature", signed, "--key", key, "--signature", file), "is no signature of an artifact")
    refused(moec("verify-signature", signed, "--key", key, "--signature", signed.parent / "none"), "cannot be read")


def test_a_damaged_artifact_is_not_signed(signed: Path, moec: Moec) -> None:
    change_a_byte(signed / "model.pte")
    refused(moec("sign", signed, "--key", signed.parent / "key.pem"), "differ")


def test_a_signature_does_not_go_into_the_artifact(signed: Path, moec: Moec) -> None:
    inside = signed / "model.sig"
    refused(moec("sign", signed, "--key", signed.parent / "key.pem", "--out", inside), "inside the artifact")
    assert not inside.exists()


def test_a_planted_link_is_not_written_through(signed: Path, moec: Moec) -> None:
    victim = signed.parent / "victim.txt"
    victim.write_text("precious")
    Path(f"{signed}.sig").unlink()
    Path(f"{signed}.sig").symlink_to(victim)
    refused(moec("sign", signed, "--key", signed.parent / "key.pem"), "is a link", f"{signed}.sig")
    assert victim.read_text() == "precious"
