"""Publishes a model on the Hugging Face Hub with its card: python train/publish.py runs/x/model owner/name ...

What is uploaded is a folder: config.json, the weights, training.json and log.jsonl (what the training run left),
samples.png and the card, README.md. `--dry-run --output FOLDER` writes that same folder here and uploads nothing; read
its card, change
what you like, and `publish.py FOLDER owner/name --as-is` uploads it as it stands.

    python train/publish.py runs/mine/model me/mine --data-name "My photos" --data-licence "They are mine" \\
        --licence apache-2.0 --data FOLDER --dry-run --output /tmp/mine

The card says nothing that was not recorded or measured: bits/dim come from `--evaluation`, or are measured on `--data`.
"""

if __name__ == "__main__":
    import ctrl_c

    ctrl_c.ends_quietly()

import argparse
import contextlib
import dataclasses
import io
import json
import os
import re
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout, with nothing installed

import torch

import data
import evaluate
from averaging import open_model
from imtx import PRESETS, ImageTransformer
from imtx.checkpoint import Origin, find
from imtx.images import save_png
from imtx.sampling import HOTTEST, MOST_GUIDANCE
from processes import told_by_the_launcher
from publishing import hub, licences, origins
from publishing.card_text import body
from publishing.cards import Entry, binding, task_of
from publishing.known_data import KNOWN, Data, Licence
from publishing.records import LOG, RECORD, Evaluation, read_text
from publishing.sheets import COLUMNS, sample_sheet

ROOT = Path(__file__).resolve().parents[1]
PORTRAITS = ROOT / "assets" / "examples" / "faces"  # free to publish; the folder above tells where they come from

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="model folder, such as OUTPUT/model of a training run, or bundled name")
    parser.add_argument("repo", help="Hub id, owner/name; made if it does not exist")
    parser.add_argument("--dry-run", action="store_true", help="write the folder to --output, upload nothing")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="with --dry-run: a new folder")
    parser.add_argument("--as-is", action="store_true", help="CHECKPOINT has its card already: upload it unchanged")
    parser.add_argument("--private", action="store_true", help="make a new repo private")
    parser.add_argument("--revision", metavar="BRANCH", help="upload to this branch, made if need be (main)")
    card = parser.add_argument_group("the card")
    card.add_argument("--data-name", metavar="NAME", help=f"{' or '.join(KNOWN)}, whose facts are known, or your own words")
    card.add_argument("--data-licence", metavar="TEXT", help="of pictures of your own: licence or source, a sentence")
    card.add_argument("--data-note", metavar="TEXT", help="more about them, after their name")
    card.add_argument("--licence", metavar="ID", help="of the weights, as the Hub abbreviates it: apache-2.0, say, or other")
    card.add_argument("--licence-name", metavar="ID", help="of an other one: my-licence-1.0, say")
    card.add_argument("--licence-link", metavar="URL", help="of an other one: the address of its text")
    card.add_argument("--title", metavar="TEXT", help="after the model's name, in place of a plain one")
    card.add_argument("--about", metavar="FILE.md", type=Path, help="Markdown of your own, put at the end")
    card.add_argument("--evaluation", metavar="FILE", type=Path, help="what evaluate.py printed, or its last line")
    card.add_argument(
        "--data", metavar="DATA", help="parquet file, or a folder: its test-* files. Bits/dim are measured on it unless "
        "there is an --evaluation; the samples of a super-resolution model get their sources from it",
    )
    data.add_reading_options(card, split="test")
    card.add_argument("--show-data", action="store_true", help="super-resolution: show sources and true pictures too")
    card.add_argument("--temperature", type=float, help="of the samples (1)")
    card.add_argument("--guidance", type=float, help="of the samples, of a model with classes (1)")
    card.add_argument("--dtype", choices=DTYPES, help="of the weights as they are stored (fp32)")
    args = parser.parse_args(argv)
    if args.dry_run != (args.output is not None) or args.dry_run and args.as_is:
        parser.error("--dry-run and --output FOLDER go together, and without --as-is.")
    if args.dry_run and (args.private or args.revision):
        parser.error("--private and --revision are for an upload: leave them out with --dry-run.")
    asked = (action for action in card._group_actions if action.dest != "cache")
    describing = [a.dest for a in asked if getattr(args, a.dest) not in (None, False, "test")]
    if args.as_is and describing:
        parser.error(f"--as-is keeps the card that is there: leave --{describing[0].replace('_', '-')} out.")
    if args.licence != "other" and (args.licence_name or args.licence_link):
        parser.error("--licence-name and --licence-link go with --licence other.")
    if not args.as_is and args.data_name is None:
        parser.error("--data-name: say what the model was trained on.")
    for action in card._group_actions:
        if isinstance(told := getattr(args, action.dest), str) and len(told.strip().splitlines()) != 1:
            wrong = "and cannot be several" if told.strip() else "and is empty: say something, or leave it out"
            parser.error(f"{action.option_strings[0]} is a line of the card, {wrong}.")
    if args.data is None and (words := data.words(args, "test")):
        parser.error(f"{words[0]} goes with --data: it says how that is read.")
    args.temperature = 1.0 if args.temperature is None else args.temperature
    args.dtype = args.dtype or "fp32"
    if not 1 / HOTTEST <= args.temperature <= HOTTEST:
        parser.error(f"--temperature must be from {1 / HOTTEST:g} to {HOTTEST:g}, got {args.temperature:g}.")
    args.guidance = 1.0 if args.guidance is None else args.guidance
    if not 0 <= args.guidance <= MOST_GUIDANCE:
        parser.error(f"--guidance must be from 0 to {MOST_GUIDANCE}, got {args.guidance}.")
    return args


def described(args: argparse.Namespace, source: str | None, source_licence: dict | None) -> tuple[Data, Licence]:
    """The data and the weights' licence. Raises SystemExit with a sentence for what only a person can tell and did not.

    source, source_licence: what the weights were made from, if known: like the data, it may leave no choice.
    """
    known = KNOWN.get(re.sub(r"\W", "", args.data_name.lower()))  # "CIFAR-10" is cifar10
    if known and args.data_licence:
        raise SystemExit(f"--data-licence: that of {known.name} is known, leave it out.")
    if not known and not args.data_licence:
        raise SystemExit("--data-licence: say in a sentence whose the pictures are, or under which licence.")
    used = known or Data(name=args.data_name, licence=args.data_licence)
    bound = {used.name: used.weights, source: binding(source_licence)}
    bound = {name: asked for name, asked in bound.items() if asked}
    for name, asked in bound.items():
        if args.licence:
            raise SystemExit(f"--licence: {name} leaves no choice, weights are {asked.plain}. Leave it out.")
    if len({(asked.id, asked.name) for asked in bound.values()}) > 1:
        all_asked = ", and ".join(f"{name} asks for `{asked.name or asked.id}`" for name, asked in bound.items())
        raise SystemExit(f"No licence fits these weights: {all_asked}. Start from others, or train a --preset.")
    if not bound and not args.licence:
        raise SystemExit("--licence: choose one for the weights, apache-2.0 say.")
    if used.people and args.show_data:
        raise SystemExit(f"--show-data: the pictures of {used.name} are of people and are not shown.")
    return used, next(iter(bound.values()), None) or licences.chosen(args.licence, args.licence_name, args.licence_link)


def figures(args: argparse.Namespace, folder: Path, model: ImageTransformer) -> Evaluation | None:
    """Of `model`, which is stored in `folder`: read from --evaluation, or measured on --data; None with neither."""
    parameters = sum(p.numel() for p in model.parameters())
    if args.evaluation is not None:
        return Evaluation.parse(read_text(args.evaluation), args.evaluation, parameters)
    if args.data is None:
        return None
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        words = [*data.words(args, "test"), "--cache", str(args.cache)]
        evaluate.main(["--checkpoint", str(folder), "--data", args.data, *words])
    print(printed.getvalue(), end="")
    return Evaluation.parse(printed.getvalue(), "evaluate.py", parameters)


def build(args: argparse.Namespace, folder: Path) -> None:
    """Writes all that is published to the new `folder`: the same files, byte for byte, whenever it is called."""
    model = open_model(args.checkpoint)
    source, config = find(args.checkpoint), model.config
    recorded = origins.origin(source)
    origin = recorded or Origin()
    made_from = origin.init or ", ".join(origin.average_of) or "what these weights were made from"
    used, licence = described(args, made_from, origin.licence)
    about = None if args.about is None else read_text(args.about)
    if args.show_data and not config.source_size:
        raise SystemExit("--show-data is for super-resolution models.")
    if args.guidance != 1 and not config.classes:
        raise SystemExit("--guidance: this model has no class that could be followed, leave it out.")
    if config.source_size and args.data is None and not used.people:
        raise SystemExit("--data: a super-resolution model needs sources to draw samples from.")
    training = origins.training(source)
    if recorded is None:  # of a copy without its record, say
        print(
            f"{source} has no training.json: nothing here tells what its weights were trained on from. If those bind, "
            f"{licence.id} is wrong for these too.", file=sys.stderr,
        )
    images, pictures = None, ""
    if config.source_size and used.people:  # a sample shows its source: nothing that comes from those people's pictures
        images = data.load(str(PORTRAITS), "train", config, cache=args.cache)
        pictures = f"{len(images)} portraits in {PORTRAITS.relative_to(ROOT)}"
    elif config.source_size:
        images = data.load(args.data, args.split, config, COLUMNS, **data.options(args))
        pictures = f"first {len(images)} {args.split} pictures"

    kept = origin if args.licence else dataclasses.replace(origin, licence=licence.named)  # a choice does not bind others
    model.origin = None if kept == Origin() else kept
    model.save_pretrained(folder, dtype=DTYPES[args.dtype])
    stored = ImageTransformer.from_pretrained(folder)
    rounded = any(not torch.equal(weight, model.state_dict()[name]) for name, weight in stored.state_dict().items())
    if rounded and args.evaluation is not None:
        raise SystemExit(f"--dtype {args.dtype} rounds the weights that {args.evaluation} is about: give --data alone.")
    if training:
        training.save(folder / RECORD)
    if log := origins.log(source, training):
        (folder / LOG).write_text(log, encoding="utf-8")
    evaluation = figures(args, folder, stored)
    stored.to("cuda" if torch.cuda.is_available() else "cpu")
    pixels, caption = sample_sheet(stored, images, args.temperature, args.guidance, args.show_data, pictures)
    save_png(pixels, folder / "samples.png")
    preset = training.preset if training else None
    if not training and not origin.init:
        preset = next((name for name in PRESETS if PRESETS[name] == config), None)
    entry = Entry(
        hub_id=args.repo, task=task_of(config), preset=preset, parameters=sum(p.numel() for p in stored.parameters()),
        dtype=str(DTYPES[args.dtype]).removeprefix("torch."), data=used.name, data_note=args.data_note, dataset=used.hub_id,
        licence=licence.id, licence_name=licence.name, licence_link=licence.link, evaluation=evaluation,
        init=origin.init,
    )
    told = {"title": args.title, "about": about, "origin": origin, "logged": bool(log)}
    text = body(entry, config, training, used, licence, caption=caption, **told)
    (folder / "README.md").write_text(entry.front_matter() + text, encoding="utf-8")


def complete(checkpoint: str, repo: str) -> Path:
    """The folder of a model. Raises SystemExit with a sentence unless its card is one for `repo`, and all else of it."""
    model = open_model(checkpoint)
    folder = find(checkpoint)
    card = folder / "README.md"
    entry = Entry.read(card)
    if entry.hub_id != repo:
        raise SystemExit(f"{card} is the card of {entry.hub_id}, not of {repo}.")
    if entry.parameters != (parameters := sum(p.numel() for p in model.parameters())):
        raise SystemExit(f"{card} says {entry.parameters} parameters, the model has {parameters}.")
    asked = binding(model.origin.licence) if model.origin else None
    if asked and (entry.licence, entry.licence_name) != (asked.id, asked.name):
        raise SystemExit(f"{card} says {entry.licence_name or entry.licence}, but these weights are {asked.plain}.")
    strange = {path.name for path in folder.iterdir()} - {path.name for one in hub.FILES for path in folder.glob(one)}
    if strange:
        raise SystemExit(f"{folder} holds what is not published, remove it first: {', '.join(sorted(strange))}.")
    return folder


@told_by_the_launcher
def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    hub.check_name(args.repo)
    if args.dry_run and args.output.exists():
        raise SystemExit(f"--output: {args.output} exists already, name a new folder.")
    options = {"message": f"Publish {args.repo.rpartition('/')[2]}", "private": args.private, "revision": args.revision}
    if args.as_is:
        folder = complete(args.checkpoint, args.repo)
        hub.check_login(args.repo)
        print(json.dumps({"published": hub.upload(folder, args.repo, **options)}))
        return
    if not args.dry_run:
        hub.check_login(args.repo)  # before hours of evaluation, not after
    try:
        if args.dry_run:
            args.output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".publish-", dir=args.output.parent if args.dry_run else None) as temporary:
            build(args, folder := Path(temporary) / "model")
            if args.dry_run:
                os.rename(folder, args.output)
                print(json.dumps({"written": str(args.output)}))
            else:
                print(json.dumps({"published": hub.upload(folder, args.repo, **options)}))
    except OSError as error:
        where = f"--output: {args.output}" if args.dry_run else f"A folder in {tempfile.gettempdir()}"
        raise SystemExit(f"{where} cannot be written: {error.strerror or error}.") from error


if __name__ == "__main__":
    main()
