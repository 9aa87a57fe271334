"""Panel: the words. Tokens, the text encoder's causal mask, and where in the picture each token is attended to."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from minidiff.explain.collect import Seen
from minidiff.explain.panel import Left, Panel, answer, line
from minidiff.explain.pictures import img
from minidiff.explain.second_look import Look, looks, read_prompt
from minidiff.models.attention import Attention, TransformerBlock, attention
from minidiff.models.clip import CLIPText
from minidiff.models.tokenizer import Tokenizer
from minidiff.page.html import Html, table, tag
from minidiff.page.languages import Text, say, words
from minidiff.page.svg import Chart, Series
from minidiff.pipeline import StableDiffusion
from minidiff.pipeline.prompts import encode

WORDS = words(__package__, "words.json")
MOST = 500_000  # bytes of maps up to which every transformer has its own; beyond, those of one size are averaged
SIDE, SMALL = 256, 96  # pixels of the picture under the maps, and of the small pictures
PADDING = 3  # tokens of padding that are shown one by one
WARM = (1.0, 0.35, 0.0)  # colour of attention


@dataclass(frozen=True, eq=False)
class Token:
    """One place of the prompt's row. ``kind``: "start", "word", "end" or "padding"."""

    k: int
    id: int
    text: str
    kind: str


def build(seen: Seen) -> Panel | Left:
    """Return the panel, or why there is none."""
    why = missing(seen)
    if why is not None:
        return Left(anchor="words", title=WORDS["title"], why=WORDS[why])
    pipe = cast(StableDiffusion, seen.pipe)
    tokens, found = tokens_of(seen), looks(seen)
    grouped = [groups(look.maps) for look in found]
    body = tag(
        "div",
        say(WORDS["intro"], "p", n=len(tokens), words=sum(t.kind == "word" for t in tokens)),
        _table(tokens, found),
        tag("h3", say(WORDS["maps"])),
        _exact(seen, found),
        None if len(grouped[0]) == len(found[0].maps) else say(WORDS["averaged"], "p"),
        tag("div", img(seen.pixels, WORDS["under"], side=SIDE), cls="map-picker needs-script", data_words=True),
        _pictures(seen, tokens, found),
        answer("q-which-word", WORDS["which?"], say(WORDS["which"], "p")),
        answer("q-padding", WORDS["padding?"], say(WORDS["padding"], "p", None, **_padding(pipe, tokens, found))),
        _shares(tokens, found),
        _causal(seen, tokens),
        answer(
            "q-clip-layer", WORDS["layer?"], say(WORDS["layer " + pipe.config.text_layer], "p", None, **_layers(seen))
        ),
    )
    return Panel(
        anchor="words",
        title=WORDS["title"],
        body=body,
        code=(
            line(Tokenizer.__call__, "row = ["),
            line(encode, "out: TextOutput"),
            line(CLIPText.__init__, "Layer(config)"),
            line(Attention.forward, "self.kernel(q, k, v"),
            line(attention, "F.scaled"),
            line(TransformerBlock.forward, "self.attn2"),
        ),
        data=_data(tokens, found, grouped),
    )


def _exact(seen: Seen, found: list[Look]) -> Html:
    """Say how the maps were made, and at how many of the run's calls."""
    whole = len(found) == len(seen.frames)
    said = WORDS["exact all" if whole else "exact"]
    return say(said, "p", steps=len(found), all=len(seen.frames), layers=len(found[0].maps))


def missing(seen: Seen) -> str | None:
    """Return the name of the text that says why this run has no words to show, or None."""
    if not isinstance(seen.pipe, StableDiffusion):
        return "no text"
    request = seen.request
    if request.prompt is None or request.prompt_embeds is not None:
        return "embeds"
    if request.prompt_style is not None:
        return "style"
    return None if seen.pipe.config.unet.context_dim is not None else "no text"


def prompt_of(seen: Seen) -> str:
    """Return the prompt of the first picture."""
    prompt = seen.request.prompt
    return prompt if isinstance(prompt, str) else (prompt or [""])[0]


def tokens_of(seen: Seen) -> list[Token]:
    """Return the tokens of the prompt, as the first text encoder reads them."""
    tokenizer = cast(StableDiffusion, seen.pipe).encoders[0][0]
    ids = row_of(tokenizer, prompt_of(seen))
    end = next((k for k, i in enumerate(ids) if i == tokenizer.end and k), len(ids) - 1)
    kinds = ["start" if k == 0 else "word" if k < end else "end" if k == end else "padding" for k in range(len(ids))]
    return [Token(k, i, tokenizer.decode([i]), kinds[k]) for k, i in enumerate(ids)]


def row_of(tokenizer: Tokenizer, text: str) -> list[int]:
    """Return the ids of a prompt, padded, without the warnings that the run gave already."""
    room = tokenizer.length - 2
    ids = [tokenizer.start, *tokenizer.encode(text)[:room], tokenizer.end]
    return ids + [tokenizer.pad] * (tokenizer.length - len(ids))


def groups(maps: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return maps by name: those of every transformer if they are few and small, otherwise averages of those of one way
    (down, mid, up) and size."""
    if sum(each.numel() for each in maps.values()) * 20 <= MOST:
        return maps
    found: dict[str, list[Tensor]] = {}
    for name, each in maps.items():
        found.setdefault(f"{name.split('.')[0]} {each.shape[-2]} x {each.shape[-1]}", []).append(each)
    return {name: torch.stack(each).mean(dim=0) for name, each in found.items()}


def mean_map(look: Look) -> Tensor:
    """Return the average of all transformers of a call, each weighing alike, at the size of the largest, (L, h, w)."""
    size = max((tuple(each.shape[1:]) for each in look.maps.values()), key=lambda s: s[0] * s[1])
    return torch.stack([F.interpolate(each[None], size, mode="nearest")[0] for each in look.maps.values()]).mean(dim=0)


def shares(found: list[Look]) -> Tensor:
    """Return the share of each token in all attention, by call, (calls, L): averages over places and transformers."""
    return torch.stack([torch.stack([m.mean(dim=(1, 2)) for m in look.maps.values()]).mean(dim=0) for look in found])


def heated(picture: Tensor, heat: Tensor, side: int) -> Tensor:
    """Return a picture (3, H, W) in grey with a map (h, w) over it, relative to its largest value."""
    size = (
        max(1, side * picture.shape[1] // max(picture.shape[1:])),
        max(1, side * picture.shape[2] // max(picture.shape[1:])),
    )
    grey = F.interpolate(picture[None], size, mode="area")[0].mean(dim=0, keepdim=True) * 0.5 + 0.1
    over = F.interpolate(heat[None, None], size, mode="bilinear", align_corners=False)[0] / heat.max().clamp(min=1e-12)
    return (grey * (1 - over) + torch.tensor(WARM)[:, None, None] * over).clamp(0, 1)


def _shown(tokens: list[Token]) -> list[Token]:
    padding = [t for t in tokens if t.kind == "padding"]
    return [t for t in tokens if t.kind != "padding"] + padding[:PADDING]


def _table(tokens: list[Token], found: list[Look]) -> Html:
    share = shares(found).mean(dim=0)
    names = ("place", "id", "token", "kind", "share")
    lines = [
        (t.k, t.id, t.text, say(WORDS[f"kind {t.kind}"]), f"{100 * float(share[t.k]):.1f} %") for t in _shown(tokens)
    ]
    rest = len(tokens) - len(lines)
    more = say(WORDS["more padding"], "p", n=rest) if rest else None
    return tag("div", table([say(WORDS[name]) for name in names], lines), more)


def _pictures(seen: Seen, tokens: list[Token], found: list[Look]) -> Html:
    over = torch.stack([mean_map(look) for look in found]).mean(dim=0)
    figures = []
    for token in _shown(tokens):
        said = token.text.replace("{", "{{").replace("}", "}}")  # an alternative text is filled in once more
        alt = Text(*(text.format(token=said) for text in WORDS["map of"]))
        caption = tag("figcaption", token.text if token.kind == "word" else say(WORDS[f"kind {token.kind}"]))
        figures.append(tag("figure", img(heated(seen.pixels, over[token.k], SMALL), alt, side=SMALL), caption))
    return tag("div", say(WORDS["each"], "p"), tag("div", *figures, cls="strip words"))


def _padding(pipe: StableDiffusion, tokens: list[Token], found: list[Look]) -> dict[str, object]:
    share, counts = shares(found).mean(dim=0), {kind: sum(t.kind == kind for t in tokens) for kind in KINDS}
    part = {kind: f"{100 * sum(float(share[t.k]) for t in tokens if t.kind == kind):.1f}" for kind in KINDS}
    return {"length": len(tokens), "count": counts["padding"], **part, "pad": pipe.encoders[0][0].pad}


KINDS = ("start", "word", "end", "padding")


def _shares(tokens: list[Token], found: list[Look]) -> Html:
    share = shares(found)
    series = []
    for colour, kind in enumerate(KINDS, start=1):
        places = [t.k for t in tokens if t.kind == kind]
        if places:
            points = [(look.frame.i, float(share[n, places].sum())) for n, look in enumerate(found)]
            series.append(Series(WORDS[f"kind {kind}"], points, colour, "line" if len(found) > 3 else "points"))
    return Chart(WORDS["shares"], WORDS["row"], WORDS["share"], series, wanted_y=(0.0, 1.0)).svg()


def _causal(seen: Seen, tokens: list[Token]) -> Html:
    """Return the answer about the causal mask: the encoder's attention, and what changes if the last word does."""
    pipe = cast(StableDiffusion, seen.pipe)
    name = "text_encoder" if "text_encoder" in pipe.parts else "text_encoder_2"
    ids = torch.tensor([[t.id for t in tokens]])
    maps, read = read_prompt(seen, name, ids)
    last = max((t.k for t in tokens if t.kind == "word"), default=0)
    other = ids.clone()
    other[0, last] = pipe.encoders[0][0].end
    _, changed = read_prompt(seen, name, other)
    before = float((read[:last] - changed[:last]).abs().max()) if last else 0.0
    after = float((read[last:] - changed[last:]).abs().max())
    used = _used(tokens)
    mean = torch.stack(maps).mean(dim=0)[:used, :used]
    big = mean.sqrt()[None].repeat(3, 1, 1).repeat_interleave(8, 1).repeat_interleave(8, 2)
    picture = tag("figure", img(1 - big, WORDS["triangle"], cls="triangle"), tag("figcaption", say(WORDS["triangle"])))
    said = say(WORDS["causal"], "p", word=tokens[last].text, place=last, before=f"{before:.3g}", after=f"{after:.3g}")
    return answer("q-causal-mask", WORDS["causal?"], said, picture)


def _used(tokens: list[Token]) -> int:
    return min(len(tokens), sum(t.kind != "padding" for t in tokens) + PADDING)


def _layers(seen: Seen) -> dict[str, object]:
    encoder = cast(StableDiffusion, seen.pipe).encoders[0][1]
    return {"n": encoder.config.layers, "width": encoder.config.width, "skip": seen.request.clip_skip}


def _data(tokens: list[Token], found: list[Look], grouped: list[dict[str, Tensor]]) -> dict[str, object]:
    """Return what the picker and the tests read: maps as bytes by call, group and token, each relative to its own
    largest value, and these values."""
    tops, levels = [], []
    for maps in grouped:
        for each in maps.values():
            top = each.amax(dim=(1, 2)).clamp(min=1e-12)
            tops.append(top)
            levels.append((each / top[:, None, None] * 255).round().to(torch.uint8).flatten())
    return {
        "tokens": [[t.id, t.text, t.kind] for t in tokens],
        "calls": [[look.frame.i, look.frame.t] for look in found],
        "groups": [[name, *each.shape[1:]] for name, each in grouped[0].items()],
        "tops": base64.b64encode(torch.cat(tops).numpy().astype("<f4").tobytes()).decode("ascii"),
        "maps": base64.b64encode(torch.cat(levels).numpy().tobytes()).decode("ascii"),
    }
