"""How a family reads text: what its files declare is done, whatever transformers makes of them."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from fixtures.tiny_dual_encoders import (
    PIECES,
    TEXT,
    make_word_tokenizer,
    save_dual_encoder,
    save_fixed_siglip2,
)
from transformers import AutoTokenizer

from modeling_dclip.data.reinforced.teachers import build_teacher
from modeling_dclip.distillation.run import read_clip
from modeling_dclip.encoders import Encoder
from modeling_dclip.encoders.families import (
    check_end_token,
    counting_cuts,
    prepare_tokenizer,
    report_cut,
    stated_length,
    tokenize_texts,
)
from modeling_dclip.encoders.loading import load_dual_encoder, load_processor
from modeling_dclip.evaluation.embedding import count_dropped_tokens, embed_texts

GOLDEN = ["Golden Retriever", "golden retriever"]


def test_a_fixed_size_siglip_2_reads_capitals_as_small_letters(tmp_path):
    folder = save_fixed_siglip2(tmp_path)
    raw = AutoTokenizer.from_pretrained(folder)(GOLDEN)["input_ids"]
    assert raw[0] != raw[1]  # what transformers makes of the files
    model, processor, _ = load_dual_encoder(folder)
    ids = tokenize_texts(model, processor, GOLDEN)["input_ids"]
    expected = [PIECES.index(letter) for letter in "golden▁retriever"] + [1]
    assert ids.shape == (2, 64)
    assert ids[0].tolist() == ids[1].tolist() == expected + [0] * (64 - len(expected))
    assert torch.equal(*embed_texts(Encoder(model, processor), GOLDEN))
    assert processor.tokenizer(GOLDEN[:1])["input_ids"] == processor.tokenizer(GOLDEN[1:])["input_ids"]
    teacher = build_teacher(str(folder))
    first, second = teacher.encode_texts(GOLDEN)
    assert (first == second).all()


@pytest.mark.parametrize("declared, reads_capitals", [(None, False), (False, True)])
def test_gemmas_tokenizer_in_a_siglip_lower_cases_unless_told_not_to(declared, reads_capitals, tmp_path):
    model, processor, _ = load_dual_encoder(save_fixed_siglip2(tmp_path, do_lower_case=declared))
    ids = tokenize_texts(model, processor, GOLDEN)["input_ids"]
    assert torch.equal(*ids) is not reads_capitals


@pytest.mark.parametrize("template", [None, "<bos> $A <eos>", "<bos> $A"])
def test_siglip_2_reads_an_end_token_and_no_start_token(template, tmp_path):
    model, processor, _ = load_dual_encoder(save_fixed_siglip2(tmp_path, template))
    assert tokenize_texts(model, processor, ["ab"])["input_ids"][0, :4].tolist() == [5, 6, 1, 0]


def test_texts_are_padded_and_cut_on_the_right_whatever_the_files_say(tmp_path):
    sides = {"padding_side": "left", "truncation_side": "left"}
    for folder, declared in ((tmp_path / "left", sides), (tmp_path / "right", {})):
        save_fixed_siglip2(folder, **declared)
    texts = ["ab", "abc" * 60]
    left, right = (load_dual_encoder(tmp_path / name)[:2] for name in ("left", "right"))
    assert torch.equal(tokenize_texts(*left, texts)["input_ids"], tokenize_texts(*right, texts)["input_ids"])
    assert tokenize_texts(*left, texts)["input_ids"][1, [0, 1, 2, 62, 63]].tolist() == [5, 6, 7, 7, 1]


def test_a_students_processor_pads_and_cuts_on_the_right(tiny_clip_dir, tmp_path):
    shutil.copytree(tiny_clip_dir, tmp_path / "clip")
    settings = json.loads((tmp_path / "clip" / "tokenizer_config.json").read_text())
    settings |= {"padding_side": "left", "truncation_side": "left"}
    (tmp_path / "clip" / "tokenizer_config.json").write_text(json.dumps(settings))
    texts = ["a dog", "a photo of the small red circle " * 20]
    turned, usual = (
        load_processor(folder)(text=texts, return_tensors="pt")["input_ids"]
        for folder in (tmp_path / "clip", tiny_clip_dir)
    )
    assert torch.equal(turned, usual)


def test_a_tokenizer_that_lower_cases_stays_as_it_is(tiny_clip_dir):
    tokenizer = AutoTokenizer.from_pretrained(tiny_clip_dir)
    tokenizer.init_kwargs["do_lower_case"] = True
    before = tokenizer.backend_tokenizer.to_str()
    assert prepare_tokenizer(tokenizer, "clip").backend_tokenizer.to_str() == before


def fake(model_type, end):
    return SimpleNamespace(
        config=SimpleNamespace(model_type=model_type, text_config=SimpleNamespace(eos_token_id=end))
    )


@pytest.mark.parametrize(
    "model_type, end, message",
    [
        ("clip", 9, "whose texts end in the token 9, where"),
        ("dmclip", 2, "whose texts end in the token 2, where"),
        ("clip", 2, "whose texts end in the highest id of a text, where"),  # words have higher ids than this end token
        ("clip", 3, None),
        ("altclip", 9, None),  # reads the first token
    ],
)
def test_an_end_token_that_texts_do_not_end_in_is_refused(model_type, end, message):
    tokenizer = make_word_tokenizer(16)
    if message is None:
        return check_end_token(fake(model_type, end), tokenizer, "somewhere")
    with pytest.raises(ValueError, match=f"Expected a tokenizer in 'somewhere' {message}"):
        check_end_token(fake(model_type, end), tokenizer, "somewhere")


def test_a_model_whose_config_names_another_end_token_is_refused(tmp_path):
    folder = save_dual_encoder("clip", tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["eos_token_id"] = 5
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="texts end in the token 5, where the text encoder reads them"):
        load_dual_encoder(folder)


def test_a_training_run_refuses_a_clip_whose_texts_all_read_alike(tiny_clip_dir, tmp_path):
    shutil.copytree(tiny_clip_dir, tmp_path / "clip")
    assert read_clip(str(tmp_path / "clip")).key
    config = json.loads((tmp_path / "clip" / "config.json").read_text())
    config["text_config"]["eos_token_id"] = 5
    (tmp_path / "clip" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="texts end in the token 5, where the text encoder reads them"):
        read_clip(str(tmp_path / "clip"))


def test_a_tokenizer_that_states_no_length_cannot_size_a_text_encoder():
    assert stated_length(make_word_tokenizer(16), "here") == 16
    with pytest.raises(ValueError, match="Expected the tokenizer at 'here' to state its longest text"):
        stated_length(make_word_tokenizer(10**30), "here")


def test_cut_texts_of_several_batches_are_told_in_one_line_and_the_same_line_once(caplog):
    with counting_cuts():
        report_cut([], 3, 16, "text")
        with counting_cuts():
            report_cut(["a long one"], 2, 16, "text")
        report_cut(["another"], 1000, 16, "text")
        assert not caplog.messages
    report_cut(["a long one", "another"], 1005, 16, "text")
    report_cut(["a long one"], 1, 8, "caption")
    assert caplog.messages == [
        "Cut 2 of 1,005 texts after 16 tokens, end token kept; first: 'a long one'...",
        "Cut 1 of 1 caption after 8 tokens, end token kept; first: 'a long one'...",
    ]


@pytest.mark.parametrize("wraps", [False, True])
def test_texts_that_open_clip_cuts_are_counted(wraps, caplog, tmp_path):
    tokenizer_of = pytest.importorskip("open_clip.tokenizer", reason="needs open_clip_torch")
    from modeling_dclip.encoders.open_clip import OpenClipTokenizer

    if wraps:  # a tokenizer of transformers whose padding is its end token, as CLIP's
        make_word_tokenizer(16, pad_token="</s>").save_pretrained(tmp_path)
        theirs, word = tokenizer_of.HFTokenizer(str(tmp_path), context_length=16), "dog "
    else:
        theirs, word = tokenizer_of.SimpleTokenizer(context_length=16), "! "  # whose id is the padding's
    tokenizer = OpenClipTokenizer(theirs)
    texts = ["", word, word * 14, word * 15, word * 40]
    assert tokenizer.count_tokens(texts) == [2, 3, 16, 17, 42] and tokenizer.count_tokens([]) == []
    model = SimpleNamespace(config=SimpleNamespace(model_type="open_clip"))
    with caplog.at_level("WARNING"):
        assert tokenize_texts(model, tokenizer, texts)["input_ids"].shape == (5, 16)
    assert "Cut 2 of 5 texts after 16 tokens" in caplog.text
    assert count_dropped_tokens(model, SimpleNamespace(tokenizer=tokenizer), texts[-1]) == 26


def test_the_end_token_of_every_text_fits_a_fixed_text_length():
    model = SimpleNamespace(config=SimpleNamespace(model_type="clip", text_config=SimpleNamespace(**TEXT)))
    ids = tokenize_texts(model, make_word_tokenizer(16), ["dog " * 40, ""])["input_ids"]
    assert ids.shape == (2, 16) and ids[0, -1] == 3 and ids[1, :2].tolist() == [0, 3]


def test_half_a_character_in_a_text_is_refused_by_its_text(tiny_clip_dir):
    model, processor, _ = load_dual_encoder(tiny_clip_dir)
    with pytest.raises(ValueError, match=r"Expected texts in UTF-8, got half a character in 'a caf\\udce9'"):
        tokenize_texts(model, processor, ["a dog", "a caf\udce9"])
