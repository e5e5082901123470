"""Models in GGUF files: written here in full precision, so that what is read can be compared."""

import json
import shutil

import numpy as np
import pytest
import torch

from kvfuse.content import model_content
from kvfuse.errors import PairError
from kvfuse.language_model import LanguageModel, load_config, load_tokenizer
from kvfuse.model import CacheToCache
from kvfuse.support import gguf as converter
from kvfuse.testing import TEMPLATES, tiny_fuser, tiny_model

gguf = pytest.importorskip("gguf")
LAYER_TENSORS = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_norm": "input_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_norm": "post_attention_layernorm",
}


@pytest.fixture(scope="module")
def model():
    return tiny_model("qwen2", tie_word_embeddings=True)


@pytest.fixture
def file(model, tmp_path, monkeypatch):
    """The model as a GGUF file, and an empty place for converted copies."""
    monkeypatch.setattr(converter.constants, "HF_HOME", str(tmp_path / "home"))
    path = tmp_path / "models" / "tiny.gguf"
    path.parent.mkdir()
    write(model, path)
    return path


def write(model, path):
    config, tokenizer = model.model.config, model.tokenizer
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_tokenizer_model("gpt2")
    vocabulary = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    writer.add_token_list(vocabulary)
    control = set(tokenizer.all_special_tokens) | {"<|user|>", "<|assistant|>", "<|system|>"}
    writer.add_token_types([3 if token in control else 1 for token in vocabulary])
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_chat_template(TEMPLATES["tagged"])
    weights = {name: tensor.numpy().astype(np.float32) for name, tensor in model.model.state_dict().items()}
    writer.add_tensor("token_embd.weight", weights["model.embed_tokens.weight"])
    writer.add_tensor("output_norm.weight", weights["model.norm.weight"])
    for layer in range(config.num_hidden_layers):
        for stored, name_here in LAYER_TENSORS.items():
            for part in ("weight", "bias"):
                name = f"model.layers.{layer}.{name_here}.{part}"
                if name in weights:
                    writer.add_tensor(f"blk.{layer}.{stored}.{part}", weights[name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_weights_tokenizer_template_and_context_come_from_the_file(file, model):
    loaded = LanguageModel.from_pretrained(file)
    assert loaded.name == str(file)
    assert loaded.context == model.context
    assert loaded.tokenizer.chat_template == model.tokenizer.chat_template
    assert loaded.tokenizer("What is Oslo?").input_ids == model.tokenizer("What is Oslo?").input_ids
    for name, tensor in model.model.state_dict().items():
        assert torch.allclose(loaded.model.state_dict()[name], tensor), name


def test_a_file_is_converted_once(file, monkeypatch):
    first = LanguageModel.from_pretrained(file)
    monkeypatch.setattr(converter, "_convert", None)
    moved = file.rename(file.with_name("moved.gguf"))
    again = LanguageModel.from_pretrained(moved)
    assert again.identity.weights == first.identity.weights
    assert again.identity.tokenizer == first.identity.tokenizer
    assert load_config(moved).vocab_size == first.model.config.vocab_size
    assert len(load_tokenizer(moved)) == len(first.tokenizer)


def test_a_folder_and_the_name_of_a_file_in_it_do_too(file):
    named = LanguageModel.from_pretrained(file.parent, gguf_file=file.name)
    assert named.identity.weights == LanguageModel.from_pretrained(file).identity.weights


def test_other_content_is_another_model(file, tmp_path):
    other = tmp_path / "other.gguf"
    write(tiny_model("qwen2", tie_word_embeddings=True, seed=1), other)
    assert LanguageModel.from_pretrained(other).identity.weights != LanguageModel.from_pretrained(file).identity.weights
    role = "the receiver's weights"
    assert model_content("receiver", str(other))[role] != model_content("receiver", str(file))[role]


def test_a_pair_answers_from_files(file, sharer, saved_models, tmp_path):
    receiver = LanguageModel.from_pretrained(file)
    tiny_fuser(receiver, sharer).save_pretrained(tmp_path / "fuser")
    names = {"sharer": saved_models / "sharer", "fuser": tmp_path / "fuser"}
    pair = CacheToCache.from_pretrained(receiver=file, **names)
    expected = CacheToCache(receiver, pair.sharers, pair.fusers).chat("What is Oslo?", max_new_tokens=4)
    assert pair.chat("What is Oslo?", max_new_tokens=4) == expected


@pytest.mark.parametrize("content", [b"", b"GGUF", b"no such thing"])
def test_a_damaged_file_is_one_line(file, content):
    file.write_bytes(content)
    with pytest.raises(PairError, match="expected a causal language model at") as caught:
        LanguageModel.from_pretrained(file)
    assert "\n" not in str(caught.value)
    assert not list(file.parents[1].glob("home/kvfuse/gguf/*"))


def test_a_file_that_is_not_there_is_named(file):
    shutil.rmtree(file.parent)
    with pytest.raises(PairError, match="no such"):
        LanguageModel.from_pretrained(file)
