"""Our blocks compute what their models compute: logits, loss and every gradient equal those of transformers.

Their parameters are looked at under our names (split, transposed), so one table serves to copy weights in and to read
gradients out. That the comparison can fail is tested as well: it must notice each of the mistakes that models are made with.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from firstwords.config import Block, ModelConfig
from firstwords.model.gpt import GPTModel
from firstwords.model.loss import target_nats

# Absolute, for a loss of 5.7, logits up to 0.7 and gradients up to 0.2. Equal models were seen to differ by 5e-7, a step of
# float32 at 5.7, since sums run in another order; the smallest mistake below, the exact GELU, by 1.6e-4. This is between.
TOLERANCE = 1e-5
GPT2 = ModelConfig(
    vocab_size=300,
    context_length=32,
    emb_dim=64,
    n_heads=4,
    n_layers=3,
    drop_rate=0.0,
    qkv_bias=True,
    tied_head=True,
)
MODERN = replace(GPT2, block="qwen3", qkv_bias=False, norm_eps=1e-6, ff_dim=96)
CONFIGS = {"gpt2": GPT2, "qwen3": MODERN}

Named = Callable[[str], Tensor]  # a peer's parameter, or its gradient, by the peer's name
Peer = Callable[..., nn.Module]  # their model for our config, with some of its own settings changed


@pytest.fixture(scope="module")
def transformers() -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")  # models are made from configurations here; nothing may be fetched
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what a foreign package warns of while it is imported is not ours to mend
            module = pytest.importorskip("transformers")
            for name in ("GPT2Config", "GPT2LMHeadModel", "Qwen3Config", "Qwen3ForCausalLM"):
                getattr(module, name)  # imported on first use
        yield module


@pytest.fixture
def peer(transformers: Any) -> Peer:
    """Return what makes their model of our shape."""

    def make(config: ModelConfig, **settings: Any) -> nn.Module:
        of_block = gpt2_peer if config.block == "gpt2" else qwen3_peer
        return of_block(transformers, config, settings)

    return make


def gpt2_peer(transformers: Any, config: ModelConfig, settings: dict[str, Any]) -> nn.Module:
    own = {
        "vocab_size": config.vocab_size,
        "n_positions": config.context_length,
        "n_embd": config.emb_dim,
        "n_head": config.n_heads,
        "n_layer": config.n_layers,
        "layer_norm_epsilon": config.norm_eps,
        "activation_function": "gelu_new",
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    model: nn.Module = transformers.GPT2LMHeadModel(transformers.GPT2Config(**(own | settings)))
    return model.eval()


def qwen3_peer(transformers: Any, config: ModelConfig, settings: dict[str, Any]) -> nn.Module:
    own = {
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.context_length,
        "hidden_size": config.emb_dim,
        "head_dim": config.head_dim,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_heads,
        "num_hidden_layers": config.n_layers,
        "intermediate_size": config.hidden_dim,
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_base},
        "hidden_act": "silu",
        "attention_bias": False,
        "tie_word_embeddings": True,
    }
    model: nn.Module = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**(own | settings)))
    return model.eval()


def under_our_names(block: Block, n_layers: int, named: Named) -> dict[str, Tensor]:
    """Return their tensors as views with our names and shapes."""
    rename = _gpt2_names if block == "gpt2" else _qwen3_names
    return {name: tensor for layer in range(n_layers) for name, tensor in rename(layer, named).items()}


def _gpt2_names(layer: int, named: Named) -> dict[str, Tensor]:
    ours, theirs = f"trf_blocks.{layer}", f"transformer.h.{layer}"
    found = {
        "tok_emb.weight": named("transformer.wte.weight"),
        "pos_emb.weight": named("transformer.wpe.weight"),
        "final_norm.scale": named("transformer.ln_f.weight"),
        "final_norm.shift": named("transformer.ln_f.bias"),
    }
    for our_norm, their_norm in (("norm1", "ln_1"), ("norm2", "ln_2")):
        found[f"{ours}.{our_norm}.scale"] = named(f"{theirs}.{their_norm}.weight")
        found[f"{ours}.{our_norm}.shift"] = named(f"{theirs}.{their_norm}.bias")
    linears = (("att.out_proj", "attn.c_proj"), ("ff.layers.0", "mlp.c_fc"), ("ff.layers.2", "mlp.c_proj"))
    for our_linear, their_linear in linears:
        found[f"{ours}.{our_linear}.weight"] = named(f"{theirs}.{their_linear}.weight").T  # a Conv1D is (in, out)
        found[f"{ours}.{our_linear}.bias"] = named(f"{theirs}.{their_linear}.bias")
    weights = named(f"{theirs}.attn.c_attn.weight").T.chunk(3)  # query, key, value
    biases = named(f"{theirs}.attn.c_attn.bias").chunk(3)
    for W, weight, bias in zip(("W_query", "W_key", "W_value"), weights, biases, strict=True):
        found |= {f"{ours}.att.{W}.weight": weight, f"{ours}.att.{W}.bias": bias}
    return found


def _qwen3_names(layer: int, named: Named) -> dict[str, Tensor]:
    parts = {
        "att.W_query.weight": "self_attn.q_proj.weight",
        "att.W_key.weight": "self_attn.k_proj.weight",
        "att.W_value.weight": "self_attn.v_proj.weight",
        "att.out_proj.weight": "self_attn.o_proj.weight",
        "att.query_norm.scale": "self_attn.q_norm.weight",
        "att.key_norm.scale": "self_attn.k_norm.weight",
        "ff.gate.weight": "mlp.gate_proj.weight",
        "ff.up.weight": "mlp.up_proj.weight",
        "ff.down.weight": "mlp.down_proj.weight",
        "norm1.scale": "input_layernorm.weight",
        "norm2.scale": "post_attention_layernorm.weight",
    }
    found = {f"trf_blocks.{layer}.{ours}": named(f"model.layers.{layer}.{theirs}") for ours, theirs in parts.items()}
    return found | {"tok_emb.weight": named("model.embed_tokens.weight"), "final_norm.scale": named("model.norm.weight")}


def their_weights(model: nn.Module, config: ModelConfig) -> dict[str, Tensor]:
    return under_our_names(config.block, config.n_layers, lambda name: model.get_parameter(name).data)


def their_gradients(model: nn.Module, config: ModelConfig) -> dict[str, Tensor]:
    def gradient(name: str) -> Tensor:
        found = model.get_parameter(name).grad
        assert found is not None, name
        return found

    return under_our_names(config.block, config.n_layers, gradient)


def our_model(config: ModelConfig) -> GPTModel:
    """Return our model with every parameter drawn, norms and biases too, so that none can be mixed up unnoticed.

    Embeddings are small, as in a model initialised like GPT-2, so that the norms' epsilon matters.
    """
    generator = torch.Generator().manual_seed(123)
    model = GPTModel(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(0.0, 0.02 if "emb" in name else 0.1, generator=generator)
            if name.endswith("scale"):
                parameter.add_(1)
    return model


def drawn_tokens() -> Tensor:
    return torch.randint(GPT2.vocab_size, (2, GPT2.context_length), generator=torch.Generator().manual_seed(1))


@dataclass(frozen=True)
class Outcome:
    """What a model makes of the tokens; the loss is of each token but the first, and the gradients are the loss's."""

    logits: Tensor
    loss: Tensor
    gradients: dict[str, Tensor]

    def distance(self, other: Outcome) -> dict[str, float]:
        """Return the largest difference of each thing that can differ, absolute."""
        assert self.gradients.keys() == other.gradients.keys()
        pairs = {"logits": (self.logits, other.logits), "loss": (self.loss, other.loss)}
        pairs |= {f"gradient of {name}": (ours, other.gradients[name]) for name, ours in self.gradients.items()}
        for name, (ours, theirs) in pairs.items():
            assert ours.shape == theirs.shape, name
        return {name: (ours - theirs).abs().max().item() for name, (ours, theirs) in pairs.items()}


def ours_on(model: GPTModel, tokens: Tensor) -> Outcome:
    """Run our model with the fused loss that training uses."""
    features = model.features(tokens)
    targets = tokens[:, 1:]
    loss = target_nats(features[:, :-1], model.out_head.weight, targets) / targets.numel()
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return Outcome(model(tokens).detach(), loss.detach(), gradients)


def theirs_on(model: nn.Module, config: ModelConfig, tokens: Tensor) -> Outcome:
    output = model(input_ids=tokens, labels=tokens)  # which it shifts by itself
    output.loss.backward()
    return Outcome(output.logits.detach(), output.loss.detach(), their_gradients(model, config))


def copy_into(theirs: nn.Module, ours: GPTModel) -> None:
    views = their_weights(theirs, ours.config)
    for name, parameter in ours.named_parameters():
        views[name].copy_(parameter.detach())


@pytest.mark.parametrize("block", CONFIGS)
def test_every_parameter_of_either_model_is_compared_once(block: str, peer: Peer) -> None:
    ours, theirs = GPTModel(CONFIGS[block]), peer(CONFIGS[block])
    views = their_weights(theirs, ours.config)
    assert {name: view.shape for name, view in views.items()} == {name: p.shape for name, p in ours.named_parameters()}
    assert sum(view.numel() for view in views.values()) == sum(parameter.numel() for parameter in theirs.parameters())


@pytest.mark.parametrize("block", CONFIGS)
def test_logits_loss_and_every_gradient_equal_those_of_transformers(block: str, peer: Peer) -> None:
    ours, theirs, tokens = our_model(CONFIGS[block]), peer(CONFIGS[block]), drawn_tokens()
    copy_into(theirs, ours)
    distance = ours_on(ours, tokens).distance(theirs_on(theirs, ours.config, tokens))
    assert len(distance) == 2 + len(list(ours.parameters()))
    assert {name: found for name, found in distance.items() if found > TOLERANCE} == {}


# That it would fail


@pytest.mark.parametrize(
    ("block", "wrong"),
    [
        pytest.param("gpt2", {"activation_function": "gelu"}, id="gpt2-exact-gelu"),
        pytest.param("gpt2", {"layer_norm_epsilon": 1e-6}, id="gpt2-epsilon"),
        pytest.param("gpt2", {"scale_attn_weights": False}, id="gpt2-unscaled-attention"),
        pytest.param("qwen3", {"hidden_act": "gelu"}, id="qwen3-gelu"),
        pytest.param("qwen3", {"rms_norm_eps": 1e-5}, id="qwen3-epsilon"),
        pytest.param("qwen3", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, id="qwen3-rope-base"),
    ],
)
def test_another_function_is_noticed(block: str, wrong: dict[str, Any], peer: Peer) -> None:
    ours, theirs, tokens = our_model(CONFIGS[block]), peer(CONFIGS[block], **wrong), drawn_tokens()
    copy_into(theirs, ours)
    assert max(ours_on(ours, tokens).distance(theirs_on(theirs, ours.config, tokens)).values()) > TOLERANCE


@pytest.mark.parametrize("block", CONFIGS)
def test_an_untransposed_matrix_is_noticed(block: str, peer: Peer) -> None:
    ours, theirs, tokens = our_model(CONFIGS[block]), peer(CONFIGS[block]), drawn_tokens()
    copy_into(theirs, ours)
    square = their_weights(theirs, ours.config)["trf_blocks.1.att.out_proj.weight"]  # any shape check lets it pass
    square.copy_(square.T.clone())
    assert ours_on(ours, tokens).distance(theirs_on(theirs, ours.config, tokens))["logits"] > TOLERANCE


@pytest.mark.parametrize("block", CONFIGS)
def test_an_untied_head_is_noticed_even_with_equal_values(block: str, peer: Peer) -> None:
    tied, theirs, tokens = our_model(CONFIGS[block]), peer(CONFIGS[block]), drawn_tokens()
    copy_into(theirs, tied)
    untied = our_model(replace(tied.config, tied_head=False))
    untied.load_state_dict(tied.state_dict())
    ours = ours_on(untied, tokens)
    ours.gradients.pop("out_head.weight")
    distance = ours.distance(theirs_on(theirs, tied.config, tokens))
    assert distance["logits"] <= TOLERANCE
    assert distance["gradient of tok_emb.weight"] > TOLERANCE
