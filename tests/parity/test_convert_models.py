"""Models and converter together: tiny random models of the reference, converted, give equal outputs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.parity import twins
from tests.tolerances import assert_close
from weights_convert.component import meta_model, read_component

CONDITIONAL = ("sd1", "sd2", "sdxl", "refiner", "inpaint", "lcm")
SIZES = ((8, 8), (16, 8), (9, 7), (5, 11))


def unet_inputs(reference: Any, batch: int, size: tuple[int, int]) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """A noisy sample, and what goes with it in the reference's words and in ours."""
    g = torch.Generator().manual_seed(batch)
    c = reference.config
    x = torch.randn(batch, c.in_channels, *size, generator=g)
    if "cross_attention_dim" not in c:
        return x, {}, {}
    context = torch.randn(batch, 7, c.cross_attention_dim, generator=g)
    theirs: dict[str, Any] = {"encoder_hidden_states": context}
    ours: dict[str, Any] = {"context": context}
    if c.addition_embed_type == "text_time":
        pooled, ids = torch.randn(batch, 24, generator=g), 1024 * torch.rand(batch, 6, generator=g)
        theirs["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": ids}
        ours["added"] = (pooled, ids)
    if c.time_cond_proj_dim:
        theirs["timestep_cond"] = ours["guidance"] = torch.randn(batch, 16, generator=g)
    return x, theirs, ours


@pytest.mark.parametrize("kind", twins.UNETS)
@torch.no_grad()
def test_unet(kind: str) -> None:
    reference = twins.unet_twin(kind)
    model = twins.ours(reference)
    sizes = SIZES if kind in CONDITIONAL else ((8, 8), (16, 8), (8, 12))  # the reference's ddpm needs multiples of 4
    for size in sizes:
        for batch in (1, 2, 3):
            x, theirs, ours = unet_inputs(reference, batch, size)
            t = torch.tensor([1, 500, 999])[:batch]
            want = reference(x, t, **theirs).sample
            assert want.std() > 0.05  # not dead: a twin whose output is constant would prove nothing
            assert_close(model(x, t, **ours), want, where=f"{kind} batch {batch} {size}")


@pytest.mark.parametrize("kind", ["sd1", "sdxl", "ddpm"])
@pytest.mark.parametrize("t", [981, 3.25, torch.tensor(981), torch.tensor(14.5), torch.tensor([981])], ids=str)
@torch.no_grad()
def test_unet_takes_a_time_in_every_form(kind: str, t: Any) -> None:
    reference = twins.unet_twin(kind)
    x, theirs, ours = unet_inputs(reference, 2, (8, 8))
    # UNet2DModel cuts a Python float to an integer, but takes a tensor as it is.
    want = reference(x, torch.tensor(t) if isinstance(t, float) else t, **theirs).sample
    assert_close(twins.ours(reference)(x, t, **ours), want, where=f"{kind} t={t}")


@torch.no_grad()
def test_unet_residuals() -> None:
    """What a ControlNet adds enters at the same places."""
    reference = twins.unet_twin("sd1")
    x, theirs, ours = unet_inputs(reference, 2, (8, 8))
    shapes = [(32, 8, 8)] * 3 + [(32, 4, 4)] + [(48, 4, 4)] * 2 + [(48, 2, 2)] + [(64, 2, 2)] * 2
    g = torch.Generator().manual_seed(0)
    down = [torch.randn(2, *s, generator=g) for s in shapes]
    mid = torch.randn(2, 64, 2, 2, generator=g)
    want = reference(x, 7, down_block_additional_residuals=down, mid_block_additional_residual=mid, **theirs).sample
    assert_close(twins.ours(reference)(x, 7, residuals=(down, mid), **ours), want)


@pytest.mark.parametrize(
    "options", [{}, {"layers_per_block": 1}, {"use_quant_conv": False, "use_post_quant_conv": False}]
)
@torch.no_grad()
def test_vae(options: dict[str, Any]) -> None:
    reference = twins.vae_twin(**options)
    model = twins.ours(reference)
    for size in ((16, 16), (20, 12), (36, 28), (18, 13)):
        for batch in (1, 2, 3):
            g = torch.Generator().manual_seed(batch)
            where = f"batch {batch} {size}"
            pixels = torch.randn(batch, 3, *size, generator=g)
            want = reference.encode(pixels).latent_dist
            got = model.encode(pixels)
            assert_close(got.mean, want.mean, where=f"mean {where}")
            assert_close(got.logvar, want.logvar, where=f"logvar {where}")
            drawn = got.sample(torch.Generator().manual_seed(0))
            assert_close(drawn, want.sample(torch.Generator().manual_seed(0)), where=f"sample {where}")
            z = torch.randn(batch, 4, size[0] // 4, size[1] // 4, generator=g)
            assert_close(model.decode(z), reference.decode(z).sample, where=f"decode {where}")


@pytest.mark.parametrize("pad", [49407, 0])
@pytest.mark.parametrize("kind", twins.CLIPS)
@torch.no_grad()
def test_text_encoder(kind: str, pad: int) -> None:
    reference = twins.clip_twin(kind)
    model = twins.ours(reference)
    for batch in (1, 2, 3):
        ids = torch.randint(1, 49406, (batch, 77), generator=torch.Generator().manual_seed(batch))
        ids[:, 0] = 49406
        for row in range(batch):
            ids[row, 5 + row] = 49407
            ids[row, 6 + row :] = pad
        want = reference(ids, output_hidden_states=True)
        got = model(ids)
        where = f"{kind} batch {batch}"
        assert_close(got.last, want.last_hidden_state, where=f"last {where}")
        assert_close(got.penultimate, want.hidden_states[-2], where=f"penultimate {where}")
        pooled = want.text_embeds if kind == "bigg" else want.pooler_output
        assert_close(got.pooled, pooled, where=f"pooled {where}")


@pytest.mark.parametrize("end", [49407, 2])
@torch.no_grad()
def test_text_encoder_pools_at_the_end_token_of_old_configs_too(end: int) -> None:
    """Configs of before mid-2023 say that the end token is 2, and the reference works around it."""
    reference = twins.clip_twin("l", eos_token_id=end)
    ids = torch.tensor([[49406, 2, 320, 49407, 49407], [49406, 320, 2, 2368, 49407]])
    assert_close(twins.ours(reference)(ids).pooled, reference(ids).pooler_output)


def rewrite(folder: Path, change: Any, config: dict[str, Any] | None = None) -> Path:
    """A component's folder with its tensors passed through ``change`` and options added to its config."""
    file = next(folder.glob("*.safetensors"))
    save_file(change(load_file(file)), file)
    if config:
        found = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(found | config))
    return folder


def same(folder: Path, reference: Any) -> None:
    """The folder converts to the same tensors as the reference it was made from."""
    found = read_component(folder)
    want = twins.ours(reference).state_dict()
    assert found.part.tensors.keys() == want.keys() == meta_model(found.config).state_dict().keys()
    for name, tensor in found.part.tensors.items():
        assert_close(tensor.load(), want[name], where=name)


OLD = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


@pytest.mark.parametrize("conv", [False, True])
@pytest.mark.parametrize("old", [False, True])
def test_attention_names_and_shapes_of_every_age(tmp_path: Path, old: bool, conv: bool) -> None:
    """The autoencoder's attention under its names of before 2023, and its matrices as 1x1 convolutions."""

    def age(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        out = {}
        for key, t in tensors.items():
            if "attentions" in key and t.ndim == 2 and conv:
                t = t[:, :, None, None].contiguous()
            if "attentions" in key and old:
                head, _, tail = key.partition("attentions.0.")
                module, _, leaf = tail.rpartition(".")
                key = f"{head}attentions.0.{OLD.get(module, module)}.{leaf}"
            out[key] = t
        return out

    reference = twins.vae_twin()
    reference.save_pretrained(tmp_path)
    same(rewrite(tmp_path, age), reference)


def test_old_attention_names_in_ddpm(tmp_path: Path) -> None:
    def age(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        names = {f".{new}.": f".{old}." for new, old in OLD.items()}
        out = {}
        for key, t in tensors.items():
            new = next((n for n in names if "attentions" in key and n in key), None)
            out[key.replace(new, names[new]) if new else key] = t
        return out

    reference = twins.unet_twin("ddpm")
    reference.save_pretrained(tmp_path)
    same(rewrite(tmp_path, age), reference)


@pytest.mark.parametrize("prefix", ["", "text_model."])
def test_text_encoder_prefixes_and_extras(tmp_path: Path, prefix: str) -> None:
    """With and without "text_model.", and with the keys that old versions of transformers added."""

    def age(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        out = {prefix + k.removeprefix("text_model."): t for k, t in tensors.items()}
        return out | {f"{prefix}embeddings.position_ids": torch.arange(77)[None], "logit_scale": torch.ones(())}

    reference = twins.clip_twin("l")
    reference.save_pretrained(tmp_path)
    same(rewrite(tmp_path, age), reference)
    dropped = {rule.name: keys for rule, keys in read_component(tmp_path).part.dropped.items()}
    assert dropped == {"position ids": [f"{prefix}embeddings.position_ids"], "contrastive scale": ["logit_scale"]}


@pytest.mark.parametrize("save", [{"max_shard_size": "100KB"}, {"safe_serialization": False}])
def test_sharded_and_pickled_components(tmp_path: Path, save: dict[str, Any]) -> None:
    reference = twins.unet_twin("sd1")
    reference.save_pretrained(tmp_path, **save)
    assert len(list(tmp_path.iterdir())) > 3 or (tmp_path / "diffusion_pytorch_model.bin").is_file()
    same(tmp_path, reference)
