"""Signatures of artifacts, in the format of OpenSSF Model Signing 1.0 (a Sigstore bundle with an in-toto statement).

The statement lists the SHA-256 of every file in the folder, the manifest and the mark `.moec` included; it is signed
with ECDSA. No network, no log and no identity service take part: whoever checks has the public key. The package
model-signing does it, and its own command line reads our signatures and writes ones that we read.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import sys
import tempfile
from pathlib import Path

from moec.compiler.artifact import Artifact
from moec.compiler.errors import ArtifactError, UserError
from moec.compiler.extras import require
from moec.compiler.files import read_bytes

PASSWORD = "MOEC_KEY_PASSWORD"  # the environment's variable for the password of a private key
_CURVES = ("secp256r1", "secp384r1", "secp521r1")
_MAX_KEY, _MAX_SIGNATURE = 1 << 16, 16 << 20  # bytes
_NO_SIGNATURE, _NAME_IT = "is no signature of an artifact", "name what `moec sign` wrote, with --signature"
_MAKE_KEYS = (
    "make a pair with `openssl ecparam -name prime256v1 -genkey -noout -out KEY` and `openssl ec -in KEY -pubout`"
)


def signature_file_of(folder: Path) -> Path:
    """`ARTIFACT.sig` beside the folder: a file inside would be one that the signature does not cover."""
    whole = folder.absolute()
    return whole.parent / f"{whole.name}.sig"


def sign(artifact: Artifact, key: Path) -> str:
    """The signature of an artifact, JSON text. Every file is compared with the manifest first.

    key: an elliptic-curve private key (P-256, P-384, P-521) in PEM form; its password is in the environment.
    UserError for a key that is none of these, ArtifactError for an artifact that is damaged or holds links.
    """
    require("model_signing", "sign", "signing")
    password = os.environ.get(PASSWORD)
    _check_key(key, private=True, password=password)
    artifact.check_contents()
    import model_signing

    # the package declares text and hands it on to one that takes bytes
    secret = None if password is None else password.encode()
    config = model_signing.signing.Config().set_hashing_config(_everything())
    config.use_elliptic_key_signer(private_key=key, password=secret)  # type: ignore[arg-type]
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "signature"
        try:
            config.sign(artifact.folder, file)
        except ValueError as error:  # a link, a pipe
            raise ArtifactError(f"cannot be signed: {error}", place=str(artifact.folder)) from error
        return file.read_text("utf-8") + "\n"


def what_differs(folder: Path, signature: Path, key: Path) -> str | None:
    """Why `signature` is not one of these contents by the owner of `key`; None if it is. Reads every file, parses none.

    key: the public key in PEM form. UserError for a signature or key that is none at all, or a folder that is missing.
    """
    require("model_signing", "sign", "checking a signature")
    _check_key(key, private=False)
    if not folder.is_dir():
        raise ArtifactError("no such artifact folder", place=str(folder))
    statement = _statement(signature)
    import model_signing
    from cryptography.exceptions import InvalidSignature

    config = model_signing.verifying.Config().set_hashing_config(_everything())
    config.use_elliptic_key_verifier(public_key=key)
    try:
        with contextlib.redirect_stdout(sys.stderr):  # where it warns of old formats
            config.verify(folder, signature)
    except InvalidSignature:
        return "the signature was not made with this key, or was changed"
    except ValueError as error:
        return " ".join(str(error).split())
    except Exception as error:  # whatever a bundle of another shape makes of the package
        raise UserError(_NO_SIGNATURE, place=str(signature), remedy=_NAME_IT) from error
    # The statement may leave paths out. It is signed, but by a signer who may not have meant this artifact's files.
    covered = {resource["name"] for resource in statement["predicate"]["resources"]}
    here = {file.relative_to(folder).as_posix() for file in folder.rglob("*") if not file.is_dir()}
    # a folder has no digest, and is signed by the files in it
    here |= {f"{place.relative_to(folder).as_posix()}/" for place in folder.rglob("*/") if not any(place.iterdir())}
    missing = sorted(here - covered)
    return f"the signature does not cover {', '.join(missing)}" if missing else None


def _everything() -> model_signing.hashing.Config:  # type: ignore[name-defined]  # noqa: F821  (an extra)
    """SHA-256 of every file: by default the package leaves out those of git."""
    import model_signing

    return model_signing.hashing.Config().set_ignored_paths(paths=[], ignore_git_paths=False)


def _statement(signature: Path) -> dict[str, dict[str, list[dict[str, str]]]]:
    """What a signature states, not checked yet; UserError where the file has no such statement."""
    raw = read_bytes(signature, limit=_MAX_SIGNATURE, remedy=_NAME_IT)
    try:
        statement = json.loads(base64.b64decode(json.loads(raw)["dsseEnvelope"]["payload"]))
        for resource in statement["predicate"]["resources"]:
            str(resource["name"])
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise UserError(_NO_SIGNATURE, place=str(signature), remedy=_NAME_IT) from error
    return dict(statement)


def _check_key(file: Path, *, private: bool, password: str | None = None) -> None:
    """UserError unless it is an elliptic-curve key in PEM form that opens."""
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    kind = "private" if private else "public"
    data = read_bytes(file, limit=_MAX_KEY, remedy=f"name a {kind} key with --key")
    try:
        if private:
            key: object = serialization.load_pem_private_key(data, None if password is None else password.encode())
        else:
            key = serialization.load_pem_public_key(data)
    except TypeError as error:  # a password is missing, or there is one too many
        raise UserError(f"{error}", place=str(file), remedy=f"set or unset {PASSWORD}") from error
    except (ValueError, UnsupportedAlgorithm) as error:
        what = f"is no {kind} key in PEM form" + (", or its password is another" if password else "")
        raise UserError(what, place=str(file), remedy=_MAKE_KEYS) from error
    known = isinstance(key, ec.EllipticCurvePrivateKey | ec.EllipticCurvePublicKey) and key.curve.name in _CURVES
    if not known:
        raise UserError("is no key on P-256, P-384 or P-521", place=str(file), remedy=_MAKE_KEYS)
