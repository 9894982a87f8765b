"""Language models that read bags, against one report after the other, word by word."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from common.networks.mil_probe import Standardizer
from common.networks.poolers import pad_bags
from common.writing.bridge import Bridge
from common.writing.model import LanguageModel, ReportModel, open_language_model

TEXTS = ["No nodule. Ground-glass opacity in the left lobe, 8 mm.", "The heart is enlarged.", "No nodule."]
TINY = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
LORA = {"r": 2, "lora_alpha": 4, "lora_dropout": 0.0, "target_modules": ["q_proj", "v_proj"]}


def language(texts: list[str] = TEXTS) -> LanguageModel:
    return open_language_model("tiny", texts=texts, tiny=TINY, dtype="float32", seed=3)


def network(
    phase: str = "full",
    lora: dict | None = None,
    lm_dim: int = 16,
    prompt: str = "No nodule.",
    cross: tuple = (),
) -> ReportModel:
    torch.manual_seed(0)
    bridge = Bridge(
        **{
            "standardizer": Standardizer([torch.randn(9, 5)], 5),
            "lm_dim": lm_dim,
            "kind": "zones",
            "num_tokens": 4,
            "num_zones": 2,
        },
        **{"width": 8, "num_layers": 1, "num_heads": 2},
    )
    return ReportModel(bridge, language(), prompt=prompt, phase=phase, lora=lora, seed=1, cross_layers=cross)


def bags(*lengths: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(length, 5, generator=generator) for length in lengths]


def test_the_tiny_vocabulary_gives_texts_back_as_they_were() -> None:
    tokenizer = language().tokenizer
    for text in TEXTS:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer("No gnus.")["input_ids"][1] == tokenizer.unk_token_id


@torch.no_grad()
def test_the_loss_is_that_of_each_word_given_those_before_it() -> None:
    model, found = network(), bags(3, 7, 2)
    loss = model(found, [model.words(text) for text in TEXTS])
    total = 0.0
    embed = model.language.get_input_embeddings()
    for bag, text in zip(found, TEXTS, strict=True):
        words = model.words(text)
        assert words[-1] == model.tokenizer.eos_token_id
        for place in range(len(words)):
            before = embed(torch.cat([torch.tensor(model.prompt), words[:place]]))
            sequence = torch.cat([model.bridge(*pad_bags([bag]))[0], before])
            logits = model.language(inputs_embeds=sequence[None]).logits[0, -1]
            total -= logits.log_softmax(0)[words[place]].item()
    assert loss.item() == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize(
    ("phase", "lora", "learns"),
    [("align", None, {"bridge"}), ("align", LORA, {"bridge"}), ("full", None, {"bridge", "language"})],
)
def test_gradients_reach_the_bridge_and_what_the_phase_lets_learn(phase, lora, learns) -> None:
    model = network(phase, lora)
    model(bags(3, 4), [model.words(text) for text in TEXTS[:2]]).backward()
    with_gradient = {name for name, weight in model.named_parameters() if weight.grad is not None}
    assert {name.partition(".")[0] for name in with_gradient} == learns
    assert {name.replace(".", "/") for name in with_gradient} == set(model.learned())
    for name, weight in model.bridge.named_parameters():
        assert weight.grad.abs().sum() > 0, name


def test_lora_alone_learns_of_the_language_model() -> None:
    names = [name for name in network("full", LORA).learned() if name.startswith("language")]
    assert len(names) == 2 * 2 * 2
    assert all("lora_" in name for name in names)


def test_writing_takes_the_likeliest_word_until_the_end() -> None:
    model, found = network(), bags(4, 6)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for _ in range(100):
        optimizer.zero_grad()
        model(found, [model.words(text) for text in TEXTS[1:]]).backward()
        optimizer.step()
    model.eval()
    written = model.write(found, max_words=20)
    assert [one.text for one in written] == TEXTS[1:]
    assert all(one.ended for one in written)
    cut = model.write(found, max_words=5)
    assert [one.ended for one in cut] == [False, True]
    assert TEXTS[1].startswith(cut[0].text)


def test_models_of_a_folder_are_opened_and_misfits_refused(tmp_path) -> None:
    model, tokenizer, _ = language()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    settings = {"texts": [], "tiny": {}, "dtype": "bfloat16", "seed": 0}
    opened = open_language_model(str(tmp_path), **settings)
    assert next(opened.model.parameters()).dtype == torch.bfloat16
    for name, weight in AutoModelForCausalLM.from_pretrained(tmp_path).state_dict().items():
        torch.testing.assert_close(opened.model.state_dict()[name], weight.bfloat16())
    assert AutoTokenizer.from_pretrained(tmp_path).decode([5, 6]) == opened.tokenizer.decode([5, 6])
    larger = language([*TEXTS, "many further words"]).tokenizer
    larger.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"{len(larger)} entries.*{len(tokenizer)} word"):
        open_language_model(str(tmp_path), **settings)
    with pytest.raises(OSError, match="Cannot open language model '.*nowhere'.*--language_model"):
        open_language_model(str(tmp_path / "nowhere"), **settings)
    with pytest.raises(ValueError, match="words 16 wide, as 'tiny', got 12"):
        network(lm_dim=12)
    with pytest.raises(ValueError, match="phase must be one of.*'all'"):
        network("all")


def test_cross_attention_begins_as_the_language_model_alone_and_learns_to_read() -> None:
    model, found = network(cross=(0, 1)), bags(4, 6)
    words = [model.words(text) for text in TEXTS[1:]]
    alone = 0.0
    for report in words:
        logits = language().model(torch.cat([torch.tensor(model.prompt), report])[None]).logits[0]
        alone -= logits.log_softmax(-1)[len(model.prompt) - 1 : -1].gather(1, report[:, None]).sum().item()
    assert model(found, words).item() == pytest.approx(alone, rel=1e-5)
    optimizer = torch.optim.AdamW(model.learned().parameters(), lr=0.01)
    for _ in range(60):
        optimizer.zero_grad()
        loss = model(found, words)
        loss.backward()
        optimizer.step()
    for name, weight in model.learned().items():
        assert weight.grad.abs().sum() > 0, name
    assert loss < 0.1 * alone
    model.eval()
    swapped = model(found[::-1], words)
    assert swapped > loss + 1  # each report was read from its own bag
    written = model.write(found, max_words=3)
    assert [one.text for one in written] == [model.write([bag], max_words=3)[0].text for bag in found]
    with pytest.raises(ValueError, match=r"from 0 to 1, got \[2\]"):
        network(cross=(2,))


@pytest.mark.parametrize("cross", [(), (1,)])
def test_packed_reports_have_the_loss_and_gradient_of_padded_ones(cross) -> None:
    model, found = network(cross=cross), bags(3, 7, 2)
    for reader in model.readers:
        reader.gate.data.fill_(0.5)
    losses, gradients = [], []
    for model.packed in (False, True):
        model.zero_grad()
        loss = model(found, [model.words(text) for text in TEXTS])
        loss.backward()
        losses.append(loss.item())
        gradients.append({name: weight.grad.clone() for name, weight in model.learned().items()})
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-5, msg=name)
