"""ComfyUI's graph, read: the nodes that a picture was made by, as its PNG files keep them under "prompt".

    {"3": {"class_type": "KSampler", "inputs": {"seed": 7, "steps": 20, ..., "model": ["4", 0]}}, "4": ...}

An input is a value, or [node, output]. One sampler is read, the one that begins, with what its inputs lead to:
checkpoint, adapters, texts, size, or the picture that it begins from. Every other node is named as not done.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from minidiff.config import quote
from minidiff.console import one_line
from minidiff.errors import CheckpointError
from minidiff.pipeline.recipes.theirs import Theirs, number, whole

PROGRAM = "comfyui"
SAMPLER = "KSampler"
OUTPUTS = {"SaveImage", "PreviewImage", "VAEDecode", "VAEDecodeTiled", "Note", "Reroute", "PrimitiveNode"}
CONTROLS = {"ControlNetApply", "ControlNetApplySD3", "ControlNetApplyAdvanced"}  # hand the texts on
BEGINS = ("EmptyLatentImage", "VAEEncode")
DEEPEST = 100  # nodes in a row

Node = Mapping[str, Any]


def read(text: str, name: str) -> Theirs:
    """Read a graph from JSON; ``name``: of its file. Raises :class:`CheckpointError` for anything else."""
    try:
        graph = json.loads(text)
    except (ValueError, RecursionError) as e:
        raise CheckpointError(f"{name}: its graph is damaged ({one_line(e, 200)})") from None
    nodes = {str(key): node for key, node in graph.items() if _is_node(node)} if isinstance(graph, dict) else {}
    if not nodes:
        raise CheckpointError(f"{name}: its graph has no nodes")
    return Reader(nodes).read()


def _is_node(node: Any) -> bool:
    return isinstance(node, dict) and isinstance(node.get("class_type"), str) and isinstance(node.get("inputs"), dict)


class Reader:
    """Reader of one graph. ``used``: nodes that the result includes."""

    def __init__(self, nodes: Mapping[str, Node]) -> None:
        self.nodes = nodes
        self.used: set[str] = set()
        self.found = Theirs(PROGRAM)

    def read(self) -> Theirs:
        """Read the graph from its sampler on."""
        found = self.found
        found.asked |= {"prompt": None, "prompt_style": PROGRAM}
        samplers = [key for key, node in self.nodes.items() if node["class_type"] == SAMPLER]
        if samplers:  # of several, another goes on with what the first one made
            self.sampler(next(filter(self.begins, samplers), samplers[0]))
        for key, node in self.nodes.items():
            if key not in self.used and node["class_type"] not in OUTPUTS:
                found.notes.append(f"node {quote(node['class_type'])}")
        return found

    def begins(self, key: str) -> bool:
        """Return True for a sampler whose latents come from no other one."""
        start = self.follow(self.nodes[key]["inputs"].get("latent_image"))
        return start is not None and self.nodes[start]["class_type"] in BEGINS

    def sampler(self, key: str) -> None:
        """Read a KSampler and what its inputs lead to."""
        self.used.add(key)
        found, inputs = self.found, self.nodes[key]["inputs"]
        for theirs, field, reader in (
            ("steps", "steps", whole),
            ("cfg", "guidance_scale", number),
            ("seed", "seed", whole),
        ):
            value = self.value(inputs.get(theirs))
            if reader(value) is None:
                found.notes.append(f"{theirs} {quote(value)}")
            else:
                found.asked[field] = reader(value)
        name, levels = self.value(inputs.get("sampler_name")), self.value(inputs.get("scheduler"))
        found.set_sampler(str(name), str(levels))
        found.asked["prompt"] = self.text(inputs.get("positive"), "positive")
        found.asked["negative_prompt"] = self.text(inputs.get("negative"), "negative") or None
        self.model(inputs.get("model"))
        self.latents(inputs.get("latent_image"), self.value(inputs.get("denoise")))

    def follow(self, link: Any) -> str | None:
        """Return the key of the node that an input leads to."""
        for _ in range(DEEPEST):
            key = str(link[0]) if isinstance(link, list) and link and isinstance(link[0], (str, int)) else None
            if key is None or key not in self.nodes:
                return None
            if self.nodes[key]["class_type"] != "Reroute":
                return key
            link = next(iter(self.nodes[key]["inputs"].values()), None)
        return None

    def node(self, link: Any, *kinds: str) -> Node | None:
        """Return the node that an input leads to, if it is of one of ``kinds``, and count it as used."""
        key = self.follow(link)
        if key is None or self.nodes[key]["class_type"] not in kinds:
            return None
        self.used.add(key)
        return self.nodes[key]

    def value(self, held: Any) -> Any:
        """Return the value of an input; that of a node without inputs of its own, if it leads to one."""
        node = self.node(held, "PrimitiveNode", "PrimitiveInt", "PrimitiveFloat", "PrimitiveString", "Seed")
        if node is None:
            return held
        return next((value for value in node["inputs"].values() if not isinstance(value, list)), None)

    def text(self, link: Any, which: str) -> str | None:
        """Return the text of a conditioning, None if there is none that is understood. What is done to it on the way is
        left out, and noted with its node; ``which``: its name where a node hands on both."""
        for _ in range(DEEPEST):
            key = self.follow(link)
            if key is None or self.nodes[key]["class_type"] not in CONTROLS:
                break
            inputs = self.nodes[key]["inputs"]
            link = inputs.get(which, inputs.get("conditioning"))
        node = self.node(link, "CLIPTextEncode")
        if node is None:
            return None
        text = self.value(node["inputs"].get("text"))
        self.clip(node["inputs"].get("clip"))
        if not isinstance(text, str):
            self.found.notes.append(f"text {quote(text)}")
            return None
        return text

    def clip(self, link: Any) -> None:
        """Read how far a text is encoded, and on to the adapters and the checkpoint."""
        for _ in range(DEEPEST):
            node = self.node(link, "CLIPSetLastLayer", "LoraLoader", "CheckpointLoaderSimple")
            if node is None or node["class_type"] == "CheckpointLoaderSimple":
                return
            if node["class_type"] == "CLIPSetLastLayer":
                layer = whole(node["inputs"].get("stop_at_clip_layer"))
                if layer is None or layer > -1:
                    self.found.notes.append(f"stop_at_clip_layer {quote(node['inputs'].get('stop_at_clip_layer'))}")
                elif layer < -1:
                    self.found.asked["clip_skip"] = -1 - layer
            link = node["inputs"].get("clip")

    def model(self, link: Any) -> None:
        """Read the adapters and the checkpoint that a model comes from."""
        found = self.found
        for _ in range(DEEPEST):
            node = self.node(link, "LoraLoader", "LoraLoaderModelOnly", "CheckpointLoaderSimple")
            if node is None:
                return
            inputs = node["inputs"]
            if node["class_type"] == "CheckpointLoaderSimple":
                found.model = str(self.value(inputs.get("ckpt_name")))
                return
            strength, words = (number(inputs.get(f"strength_{part}")) for part in ("model", "clip"))
            name = str(self.value(inputs.get("lora_name")))
            if strength is None:
                found.notes.append(f"lora {quote(name)}")
            else:
                found.lora.insert(0, (name, strength))  # the last one comes first from here
                if node["class_type"] == "LoraLoader" and words != strength:
                    found.notes.append(f"lora {quote(name)} with strength {quote(words)} for the text")
            link = inputs.get("model")

    def latents(self, link: Any, denoise: Any) -> None:
        """Read the size, or the picture to begin from and how much of it may change."""
        found = self.found
        node = self.node(link, "EmptyLatentImage", "VAEEncode")
        if node is None:
            return
        if node["class_type"] == "EmptyLatentImage":
            sides = {side: whole(self.value(node["inputs"].get(side))) for side in ("width", "height")}
            found.asked |= {side: value for side, value in sides.items() if value is not None}
            if number(denoise) != 1:
                found.notes.append(f"denoise {quote(denoise)} without a picture")
            return
        loader = self.node(node["inputs"].get("pixels"), "LoadImage")
        if loader is not None:
            found.pictures["image"] = str(loader["inputs"].get("image"))
            if number(denoise) is None:
                found.notes.append(f"denoise {quote(denoise)}")
            else:
                found.asked["strength"] = number(denoise)
