"""`moec sign` and `moec verify-signature`: who signed an artifact, and that nothing in it changed since."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from moec.cli.status import CHECK_FAILED, DONE
from moec.compiler.errors import UserError

Folder = Annotated[Path, typer.Argument(metavar="ARTIFACT", help="An artifact folder.")]


def register(app: typer.Typer) -> None:
    app.command("sign")(sign)
    app.command("verify-signature")(verify_signature)


def sign(
    artifact: Folder,
    key: Annotated[Path, typer.Option(help="A private key in PEM form: P-256, P-384 or P-521.")],
    out: Annotated[Path | None, typer.Option(help="The signature. Default: ARTIFACT.sig, beside the folder.")] = None,
) -> None:
    """Sign the digests of all files of an artifact, as OpenSSF Model Signing does. Nothing leaves this machine.

    The password of a key is taken from the environment: MOEC_KEY_PASSWORD. `model_signing verify key` accepts the
    same signature.

    Example: [bold]moec sign build/s --key key.pem[/bold]

    A new key: openssl ecparam -name prime256v1 -genkey -noout -out key.pem
    """
    from moec.analysis.provenance import signature
    from moec.cli.output import check_writable, write_text
    from moec.compiler.artifact import Artifact

    file = out if out is not None else signature.signature_file_of(artifact)
    if file.resolve().is_relative_to(artifact.resolve()):
        what = "lies inside the artifact, where it would be a file that no signature covers"
        raise UserError(what, place=str(file), remedy="choose another place with --out")
    if out is None and file.is_symlink():  # planted beside what was downloaded, it would name a file to overwrite
        raise UserError("is a link", place=str(file), remedy="remove it, or name the file to write with --out")
    check_writable(file)
    write_text(file, signature.sign(Artifact.open(artifact), key))
    print(file)


def verify_signature(
    artifact: Folder,
    key: Annotated[Path, typer.Option(help="The signer's public key in PEM form.")],
    signature: Annotated[Path | None, typer.Option(help="Default: ARTIFACT.sig, beside the folder.")] = None,
) -> int:
    """Check that an artifact is what the owner of a key signed: status 1 if a file was changed, added or removed.

    No file of the artifact is interpreted before its digest is known to be right.

    Example: [bold]moec verify-signature build/s --key key.pub[/bold]

    The public key of key.pem: openssl ec -in key.pem -pubout -out key.pub
    """
    from moec.analysis.provenance.signature import signature_file_of, what_differs
    from moec.compiler.units import printable

    wrong = what_differs(artifact, signature if signature is not None else signature_file_of(artifact), key)
    if wrong is not None:
        print(printable(f"{artifact}: {wrong}"), file=sys.stderr)
        return CHECK_FAILED
    print(f"{artifact}: signed with this key, and unchanged")
    return DONE
