"""`TextModel` puts the parts together from the files of a model, GGUF or safetensors."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tokenizers import processors

from cortexd.errors import BadModelFile, InvalidRequest, TemplateRenderFailed
from cortexd.models import ModelFiles
from engine.text.text_model import TextModel
from tests.engine.text.chat_templates import CHATML, THINKING_WITH_TOOLS
from tests.engine.text.gguf_metadata import (
    byte_level_metadata,
    sentencepiece_metadata,
    train_byte_level,
    write_gguf,
)

USER = [{"role": "user", "content": "hi"}]
TOOLS = [{"type": "function", "function": {"name": "look_up"}}]


def _gguf_model(tmp_path: Path, metadata: dict[str, Any]) -> ModelFiles:
    path = write_gguf(tmp_path / "model.gguf", metadata)
    return ModelFiles(
        model_id="test/model", source="path", revision="x", format="gguf", weights=(str(path),)
    )


def _write(path: Path, content: object) -> str:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


def _dense_model(tmp_path: Path, **files: object) -> ModelFiles:
    """Return the files of a safetensors model; the weights are never opened."""
    tokenizer = train_byte_level("qwen2")
    tokenizer.enable_truncation(4)  # as some published files have it by mistake
    paths = {"tokenizer": _write(tmp_path / "tokenizer.json", tokenizer.to_str())}
    for field, content in files.items():
        paths[field] = _write(tmp_path / f"{field}.json", content)
    return ModelFiles(
        model_id="test/model",
        source="path",
        revision="x",
        format="safetensors",
        weights=("none.safetensors",),
        **paths,
    )


def test_load_gguf_renders_encodes_and_decodes(tmp_path: Path) -> None:
    """From a GGUF file alone comes everything a chat request needs."""
    metadata = byte_level_metadata(
        train_byte_level("smollm"), "smollm", **{"tokenizer.chat_template": CHATML}
    )
    model = TextModel.load(_gguf_model(tmp_path, metadata))
    prompt = model.render_chat(USER)
    assert prompt.endswith("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")
    ids = model.encode(prompt, add_special_tokens=False)
    assert model.decode(ids) == prompt
    assert "<|im_end|>" not in model.decode(ids, skip_special_tokens=True)
    detokenizer = model.detokenizer()
    assert "".join(detokenizer.push([token]) for token in ids) + detokenizer.flush() == (
        model.decode(ids, skip_special_tokens=True)
    )
    assert model.token_bytes(ids[0]) == b"<|im_start|>"
    assert model.vocab_size == len(metadata["tokenizer.ggml.tokens"])


def test_load_gguf_sentencepiece_adds_bos_to_completions_only(tmp_path: Path) -> None:
    """The begin token is for plain prompts; a template writes its own."""
    model = TextModel.load(_gguf_model(tmp_path, sentencepiece_metadata()))
    ids = model.encode("the fox", add_special_tokens=True)
    assert ids[0] == 1
    assert ids[1:] == model.encode("the fox", add_special_tokens=False)
    assert model.decode(ids[1:]) == "the fox"
    assert model.eos_token_ids == (2,)
    with pytest.raises(InvalidRequest, match="has no chat template"):
        model.render_chat(USER)


def test_end_tokens_are_the_union_of_all_places(tmp_path: Path) -> None:
    """Config, generation config, tokenizer config and the template each may name one."""
    model = TextModel.load(
        _dense_model(
            tmp_path,
            config={"eos_token_id": 7, "text_config": {"eos_token_id": [8, None]}},
            generation_config={"eos_token_id": [9, 10]},
            tokenizer_config={
                "eos_token": {"content": "<|endoftext|>"},
                "chat_template": [{"name": "default", "template": CHATML}],
            },
        )
    )
    end_of_text, turn_end = (
        model.encode(token, add_special_tokens=False)[0]
        for token in ("<|endoftext|>", "<|im_end|>")
    )
    assert set(model.eos_token_ids) == {7, 8, 9, 10, end_of_text, turn_end}


def test_end_tokens_of_gguf_include_eot_and_eom(tmp_path: Path) -> None:
    """GGUF's end-of-turn and end-of-message ids count; ids out of range do not."""
    extra = {"tokenizer.ggml.eot_token_id": 5, "tokenizer.ggml.eom_token_id": 2**32 - 1}
    metadata = byte_level_metadata(train_byte_level("smollm"), "smollm", **extra)
    model = TextModel.load(_gguf_model(tmp_path, metadata))
    assert set(model.eos_token_ids) == {5, metadata["tokenizer.ggml.eos_token_id"]}


def test_template_file_wins_over_tokenizer_config(tmp_path: Path) -> None:
    """chat_template.jinja is newer than what tokenizer_config.json holds."""
    model = TextModel.load(
        _dense_model(
            tmp_path,
            chat_template="file {{ bos_token }}{{ pad_token }}",
            tokenizer_config={"chat_template": "config", "bos_token": "<b>", "pad_token": None},
        )
    )
    assert model.render_chat(USER) == "file <b>"


def test_named_gguf_templates_are_found(tmp_path: Path) -> None:
    """`tokenizer.chat_template.tool_use` serves requests with tools."""
    extra = {
        "tokenizer.chat_template": "plain",
        "tokenizer.chat_template.tool_use": "tools {{ tools[0].function.name }}",
    }
    metadata = byte_level_metadata(train_byte_level("smollm"), "smollm", **extra)
    model = TextModel.load(_gguf_model(tmp_path, metadata))
    assert model.render_chat(USER) == "plain"
    assert model.render_chat(USER, tools=TOOLS) == "tools look_up"
    assert model.can_call_tools


def test_template_without_tools_is_refused_not_ignored(tmp_path: Path) -> None:
    """Tools that do not reach the prompt are an error, even if the user spells their names."""
    model = TextModel.load(_dense_model(tmp_path, chat_template=CHATML))
    assert not model.can_call_tools
    for content in ("hi", "please look_up"):
        with pytest.raises(TemplateRenderFailed, match=r"does not render tools .*look_up"):
            model.render_chat([{"role": "user", "content": content}], tools=TOOLS)
    thinking = TextModel.load(_dense_model(tmp_path, chat_template=THINKING_WITH_TOOLS))
    assert "look_up" in thinking.render_chat(USER, tools=TOOLS)


def test_template_that_refuses_the_probe_is_judged_by_its_prompt(tmp_path: Path) -> None:
    """A template that wants more than one message may still render tools."""
    source = (
        "{% if messages | length < 2 %}{{ raise_exception('two') }}{% endif %}{{ tools | tojson }}"
    )
    model = TextModel.load(_dense_model(tmp_path, chat_template=source))
    assert "look_up" in model.render_chat([*USER, *USER], tools=TOOLS)


def test_answer_format_finds_special_markers_and_shows_them(tmp_path: Path) -> None:
    """Markers that are special tokens are hidden from clients but not from the parser."""
    files = _dense_model(tmp_path, chat_template="[THINK]")
    text = train_byte_level("qwen2").to_str()
    content = json.loads(text.replace("<think>", "[THINK]").replace("</think>", "[/THINK]"))
    for token in content["added_tokens"]:
        token["special"] = True
    _write(tmp_path / "tokenizer.json", content)
    model = TextModel.load(files)
    assert model.can_reason
    found = model.answer_format(model.render_chat(USER), None)
    assert found is not None
    assert found.begins_in_reasoning
    ids = model.encode("a[/THINK]b<|im_end|>", add_special_tokens=False)
    assert model.detokenizer(shows_markers=True).push(ids) == "a[/THINK]b"
    assert model.detokenizer().push(ids) == "ab"


def test_encode_is_never_truncated(tmp_path: Path) -> None:
    """A truncation stored in tokenizer.json does not cut prompts."""
    model = TextModel.load(_dense_model(tmp_path))
    assert model.decode(model.encode("word " * 50, add_special_tokens=False)) == "word " * 50


def test_encode_half_a_surrogate_pair_is_the_callers_error(tmp_path: Path) -> None:
    """JSON can spell what no text can hold."""
    model = TextModel.load(_dense_model(tmp_path))
    with pytest.raises(InvalidRequest, match="half of a surrogate pair"):
        model.encode("a\ud800", add_special_tokens=False)


def test_encode_applies_the_post_processor_on_request(tmp_path: Path) -> None:
    """tokenizer.json's own begin token is added to completions only."""
    tokenizer = train_byte_level("llama-bpe")
    bos = tokenizer.token_to_id("<|im_start|>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single=["<|im_start|>", "$A"], special_tokens=[("<|im_start|>", bos)]
    )
    files = _dense_model(tmp_path)
    _write(tmp_path / "tokenizer.json", tokenizer.to_str())
    model = TextModel.load(files)
    assert model.encode("x", add_special_tokens=True)[0] == bos
    assert model.encode("x", add_special_tokens=False)[0] != bos


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, {}),
        (
            {"temperature": 1, "top_k": 20, "top_p": 0.8, "do_sample": True, "min_p": "no"},
            {"temperature": 1.0, "top_k": 20, "top_p": 0.8},
        ),
        ({"do_sample": False, "temperature": 0.6}, {"temperature": 0.0}),
    ],
)
def test_default_sampling_comes_from_generation_config(
    tmp_path: Path, config: dict[str, Any], expected: dict[str, float]
) -> None:
    """The publisher's recommendation is kept by request name, unusable values dropped."""
    model = TextModel.load(_dense_model(tmp_path, generation_config=config))
    assert model.default_sampling == expected


@pytest.mark.parametrize(
    ("field", "content", "text"),
    [
        ("tokenizer_config", "{", "not valid JSON"),
        ("generation_config", "[]", "must hold a JSON object"),
        ("config", "[" * 100_000, "not valid JSON"),
        ("tokenizer", "{}", "not a tokenizer"),
    ],
)
def test_load_broken_file_is_named(tmp_path: Path, field: str, content: str, text: str) -> None:
    """A file that cannot be used is named with the cause."""
    with pytest.raises(BadModelFile, match=text) as caught:
        TextModel.load(_dense_model(tmp_path, **{field: content}))
    assert f"{field}.json" in caught.value.message


def test_load_missing_files_are_named(tmp_path: Path) -> None:
    """A vanished file, and a dense model without tokenizer.json, are errors of their own."""
    files = _dense_model(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(BadModelFile, match=r"tokenizer\.json: cannot be read"):
        TextModel.load(files)
    bare = ModelFiles(
        model_id="m", source="path", revision="x", format="safetensors", weights=("w",)
    )
    with pytest.raises(BadModelFile, match=r"has no tokenizer\.json"):
        TextModel.load(bare)


def test_import_needs_no_torch() -> None:
    """A front that imports the text and source parts does not load torch or the hub's client."""
    code = (
        "import sys, engine.text.text_model, engine.text.stop_strings, engine.sources;"
        "print([name for name in ('torch', 'huggingface_hub', 'transformers') "
        "if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_tokenizer_without_needed_tokens_is_named(tmp_path: Path) -> None:
    """An end token that is none, or characters without tokens, would go unnoticed for long."""
    config = {"eos_token": "<|nothing|>"}
    with pytest.raises(BadModelFile, match=r'config\.json: eos_token "<\|nothing\|>" is no token'):
        TextModel.load(_dense_model(tmp_path, tokenizer_config=config))
    state = json.loads(train_byte_level("gpt-2").to_str())
    state["model"]["merges"] = []
    state["model"]["vocab"] = {"a": 0, "b": 1}
    files = _dense_model(tmp_path)
    Path(str(files.tokenizer)).write_text(json.dumps(state))
    with pytest.raises(BadModelFile, match=r"tokenizer\.json: .* no token for \d+ ASCII"):
        TextModel.load(files)
    metadata = byte_level_metadata(train_byte_level("gpt-2"), "gpt-2")
    tokens = metadata["tokenizer.ggml.tokens"]
    metadata["tokenizer.ggml.tokens"] = [token.replace("q", "\u0100") for token in tokens]
    metadata["tokenizer.ggml.tokens"][tokens.index("q")] = "<odd>"
    merges = metadata["tokenizer.ggml.merges"]
    metadata["tokenizer.ggml.merges"] = [merge for merge in merges if "q" not in merge]
    with pytest.raises(BadModelFile, match=r"gguf tokenizer\.ggml\.tokens: .* such as 'q'"):
        TextModel.load(_gguf_model(tmp_path, metadata))


def test_template_with_a_syntax_error_names_its_file(tmp_path: Path) -> None:
    """The caller cannot help it: the file and the line are told."""
    config = {"chat_template": "{{ ok }}\n{% for x in %}"}
    model = TextModel.load(_dense_model(tmp_path, tokenizer_config=config))
    place = r"tokenizer_config\.json chat_template, line 2"
    with pytest.raises(InvalidRequest, match=place):
        model.render_chat(USER)
    assert not model.can_call_tools


def test_huge_json_beside_a_model_is_not_read(tmp_path: Path) -> None:
    """A file of the wrong size costs no memory."""
    files = _dense_model(tmp_path, generation_config={})
    with Path(str(files.generation_config)).open("wb") as file:
        file.truncate(1 << 34)
    with pytest.raises(BadModelFile, match="at most 16777216 are accepted"):
        TextModel.load(files)
