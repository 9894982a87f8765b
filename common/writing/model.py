"""A language model that reads a bag of embeddings and writes a report."""

# B bags, S tokens of a bag, D embedding, Q soft words, T words of the longest report, L width of the model

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional

from common.embeddings.store import check_identity
from common.networks.mil_probe import Standardizer
from common.networks.poolers import pad_bags
from common.writing.bridge import Bridge, GatedReader

TINY = "tiny"
PHASES = ("align", "full")
WEIGHTS, CARD, LANGUAGE = "report.safetensors", "report.json", "language_model"  # in a run's folder
IGNORED = -100  # of cross entropy: places that are no words of the report


class LanguageModel(NamedTuple):
    """A causal language model and its vocabulary, of ``transformers``."""

    model: Any
    tokenizer: Any
    name: str


class Generated(NamedTuple):
    """What was written of one volume."""

    text: str
    ended: bool  # by itself, before the longest length


def open_language_model(
    name: str, *, texts: Sequence[str], tiny: Mapping[str, Any], dtype: str, seed: int
) -> LanguageModel:
    """Open a language model, or make a tiny one for the words of some reports.

    No code of a repository is run, and weights are safetensors. Frozen or not is for :class:`ReportModel`.

    Args:
        name: "tiny"; or the folder or Hugging Face id of any causal language model of ``transformers``.
        texts: training reports, the vocabulary of the tiny one: every word with the blank before it.
        tiny: further arguments of ``transformers.LlamaConfig`` for the tiny one.
        dtype: number type of the weights, "float32" or "bfloat16".
        seed: of the tiny one's initial weights.

    Raises:
        OSError: if there is no such model, or this machine may or can not fetch it.
        ValueError: if its vocabulary has more entries than the model has word embeddings.
    """
    import transformers  # here: takes seconds, and whoever reads a config needs none

    if name == TINY:
        tokenizer = word_tokenizer(texts)
        ids = {f"{key}_token_id": getattr(tokenizer, f"{key}_token_id") for key in ("pad", "bos", "eos")}
        config = transformers.LlamaConfig(vocab_size=len(tokenizer), **ids, **tiny)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model: Any = transformers.LlamaForCausalLM(config)
    else:
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=False)
            model = transformers.AutoModelForCausalLM.from_pretrained(
                name, trust_remote_code=False, use_safetensors=True, dtype=getattr(torch, dtype)
            )
        except OSError as error:
            raise OSError(
                f"Cannot open language model '{name}' ({str(error).splitlines()[0]}). Accept its terms on "
                f"https://huggingface.co/{name} and run 'hf auth login', or pass --language_model with a "
                "folder or another model."
            ) from error
    rows = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > rows:
        raise ValueError(
            f"The tokenizer of '{name}' has {len(tokenizer)} entries, its language model {rows} word "
            "embeddings. Use the tokenizer that the model was trained with."
        )
    if tokenizer.eos_token_id is None:
        raise ValueError(f"The tokenizer of '{name}' has no token that ends a text (eos_token).")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return LanguageModel(model.to(getattr(torch, dtype)), tokenizer, name)


def word_tokenizer(texts: Sequence[str]) -> Any:  # noqa: ANN401 (transformers has no types)
    """Make a vocabulary of whole words and stops; decoding gives a text of known words back as it was."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    words = Regex(r" ?[\w-]+| ?[^\w\s]")  # a word takes the blank before it along
    tokenizer.pre_tokenizer = pre_tokenizers.Split(words, behavior="removed", invert=True)
    tokenizer.decoder = decoders.Fuse()
    tokenizer.train_from_iterator(texts, trainers.WordLevelTrainer(special_tokens=list(special.values())))
    options: dict[str, Any] = {"tokenizer_object": tokenizer, "clean_up_tokenization_spaces": False}
    return PreTrainedTokenizerFast(**options, **special)  # type: ignore[no-untyped-call]


class ReportModel(nn.Module):
    """Put the soft words of a bridge before the words of a report, or let these read them on the way.

    The sequence is: Q soft words, the words of ``prompt``, the report, the end of the text. With
    ``cross_layers`` the soft words are not in it: before each of those layers, gated cross-attention reads
    them. Sequences are padded at their ends, or packed: in one row behind each other, none seeing another.

    Args:
        bridge: from the bag to soft words.
        language: the language model.
        prompt: text between the soft words and the report, the same for all.
        phase: "align": the bridge alone learns; "full": the language model too.
        lora: arguments of ``peft.LoraConfig``, by which the model learns in "full"; None for all its weights.
        seed: seed of LoRA's initial weights.
        cross_layers: numbers of layers of the language model, from 0; none for a soft prompt.
        packed: whether a batch learns as one row; the loss is the same.

    Raises:
        ValueError: if the phase is unknown, the bridge is not as wide as the model's words, or there is no
            such layer, or with ``cross_layers`` no prompt.
    """

    def __init__(
        self,
        bridge: Bridge,
        language: LanguageModel,
        *,
        prompt: str,
        phase: str,
        lora: Mapping[str, Any] | None,
        seed: int,
        cross_layers: Sequence[int] = (),
        packed: bool = False,
    ) -> None:
        super().__init__()
        if phase not in PHASES:
            raise ValueError(f"phase must be one of {PHASES}, got '{phase}'.")
        self.bridge, self.language, self.tokenizer = bridge, language.model, language.tokenizer
        width, made = self.language.get_input_embeddings().embedding_dim, bridge.exit[-1].out_features
        if made != width:
            raise ValueError(f"The bridge must give words {width} wide, as '{language.name}', got {made}.")
        self.language.requires_grad_(phase == "full" and lora is None)
        if lora is not None:
            from peft import LoraConfig, inject_adapter_in_model  # here: takes seconds

            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                inject_adapter_in_model(LoraConfig(**lora), self.language)
            for name, weight in self.language.named_parameters():
                if ".lora_" in name:  # small steps vanish in 16 bits
                    weight.data = weight.data.float()
                    weight.requires_grad_(phase == "full")
        bos = self.tokenizer.bos_token_id
        start = [] if bos is None else [bos]
        self.prompt = start + self.tokenizer(prompt, add_special_tokens=False)["input_ids"]
        self.packed = packed
        self.soft = torch.empty(0)  # what the readers read: of the bags at hand
        self.seen: torch.Tensor | None = None  # by which word of a packed row; None for all
        self.readers = nn.ModuleList(GatedReader(width, bridge.num_heads) for _ in cross_layers)
        if cross_layers:
            self._read_before(cross_layers)

    def _read_before(self, numbers: Sequence[int]) -> None:
        count = self.language.config.num_hidden_layers
        if wrong := [number for number in numbers if not 0 <= number < count]:
            raise ValueError(f"cross_layers must be numbers from 0 to {count - 1}, got {wrong}.")
        if not self.prompt:
            raise ValueError("prompt must have a word with cross_layers, after which the report begins.")
        lists = (part for part in self.language.modules() if isinstance(part, nn.ModuleList))
        layers = next(part for part in lists if len(part) == count)
        for reader, number in zip(self.readers, numbers, strict=True):
            layers[number].register_forward_pre_hook(
                lambda _, given, reader=reader: (reader(given[0], self.soft, self.seen), *given[1:])
            )

    def learned(self) -> nn.ParameterDict:
        """Return what learns, by name with ``/`` for each dot: shared with the network, not copied."""
        weights = self.named_parameters()
        return nn.ParameterDict({n.replace(".", "/"): w for n, w in weights if w.requires_grad})

    def words(self, text: str) -> torch.Tensor:
        """Return the numbers ``(T,)`` of a report's words and of the end of the text."""
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return torch.tensor([*ids, self.tokenizer.eos_token_id])

    def forward(self, bags: Sequence[torch.Tensor], reports: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return the negative log-likelihood of the reports, summed over all their words.

        Args:
            bags: B bags ``(S, D)`` of any lengths.
            reports: B reports ``(T,)`` of :meth:`words`, of any lengths.
        """
        start = self._start(bags)
        if self.packed:
            return self._packed_loss(start, [report.to(start.device) for report in reports])
        pad = nn.utils.rnn.pad_sequence
        targets = pad(list(reports), batch_first=True, padding_value=IGNORED).to(start.device)
        there = targets != IGNORED
        embedded = self.language.get_input_embeddings()(targets.clamp(min=0))
        sequence = torch.cat([start, embedded], dim=1)
        mask = torch.cat([there.new_ones(start.shape[:2]), there], dim=1).long()
        # logits of the word before each word of a report
        logits = self.language(
            inputs_embeds=sequence,
            attention_mask=mask,
            use_cache=False,
            logits_to_keep=targets.shape[1] + 1,
        ).logits[:, :-1]
        return functional.cross_entropy(
            logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum"
        )

    def _packed_loss(self, start: torch.Tensor, reports: list[torch.Tensor]) -> torch.Tensor:
        """Return the loss of reports that lie in one row behind each other, each behind its start."""
        embed, device = self.language.get_input_embeddings(), start.device
        row = torch.cat(
            [part for begin, report in zip(start, reports, strict=True) for part in (begin, embed(report))]
        )
        lengths = torch.tensor([len(report) for report in reports], device=device) + start.shape[1]
        owner = torch.arange(len(lengths), device=device).repeat_interleave(lengths)
        place = torch.arange(len(row), device=device) - (lengths.cumsum(0) - lengths)[owner]
        self.seen = owner[:, None] == torch.arange(len(lengths), device=device).repeat_interleave(
            self.soft.shape[1]
        )
        self.soft = self.soft.flatten(0, 1)[None]
        before_words = (place >= start.shape[1] - 1) & (place < lengths[owner] - 1)
        # where positions begin anew, transformers lets no word look further back
        logits = self.language(
            inputs_embeds=row[None],
            position_ids=place[None],
            use_cache=False,
            logits_to_keep=before_words.nonzero()[:, 0],
        ).logits[0]
        return functional.cross_entropy(logits.float(), torch.cat(reports), reduction="sum")

    @torch.no_grad()
    def write(self, bags: Sequence[torch.Tensor], max_words: int) -> list[Generated]:
        """Write the most likely next word until the text ends, or is ``max_words`` long."""
        start = self._start(bags)
        ends = self.tokenizer.eos_token_id
        found = self.language.generate(
            inputs_embeds=start,
            attention_mask=torch.ones(start.shape[:2], dtype=torch.long, device=start.device),
            max_new_tokens=max_words,
            do_sample=False,
            num_beams=1,
            temperature=None,
            top_p=None,
            pad_token_id=self.tokenizer.pad_token_id,
            eos_token_id=ends,
        ).tolist()
        texts = self.tokenizer.batch_decode(found, skip_special_tokens=True)
        return [Generated(text.strip(), ends in ids) for text, ids in zip(texts, found, strict=True)]

    def _start(self, bags: Sequence[torch.Tensor]) -> torch.Tensor:
        """Embed soft words, unless they are read on the way, and prompt, ``(B, Q + P, L)``."""
        embed = self.language.get_input_embeddings()
        self.soft, self.seen = self.bridge(*pad_bags(bags)), None
        ids = torch.tensor(self.prompt, device=self.soft.device, dtype=torch.long)
        prompt: torch.Tensor = embed(ids).expand(len(bags), -1, -1)
        return prompt if self.readers else torch.cat([self.soft.to(prompt.dtype), prompt], dim=1)


def read_card(folder: str | Path) -> dict[str, Any]:
    """Read what a finished run says of itself.

    Raises:
        FileNotFoundError: if the folder holds no such run.
    """
    for path in (Path(folder) / WEIGHTS, Path(folder) / CARD):
        if not path.is_file():
            raise FileNotFoundError(f"No '{path.name}' in '{folder}'. Pass the output_dir of a finished run.")
    card: dict[str, Any] = json.loads((Path(folder) / CARD).read_text(encoding="utf-8"))
    return card


@torch.no_grad()
def begin_with(network: ReportModel, folder: str | Path | None, identity: Mapping[str, Any]) -> ReportModel:
    """Give a network what an earlier run learned, such as the bridge of phase "align"; returns the network.

    Args:
        network: the model; what the earlier run did not learn stays as it is.
        folder: folder of the earlier run; None for none.
        identity: facts of the embeddings at hand, which must be those that the run learned from.

    Raises:
        FileNotFoundError: if the folder holds no such run.
        ValueError: if the embeddings are of another origin, or a weight has no place in the network or
            another shape, as that of a bridge of another width.
    """
    if folder is None:
        return network
    known = read_card(folder)["embeddings"]
    remedy = "Use the embeddings of that encoder, or train anew."
    check_identity(dict(identity), known, of="the embeddings", source=f"in '{folder}'", remedy=remedy)
    weights = network.state_dict()
    for key, tensor in load_file(Path(folder) / WEIGHTS).items():
        name = key.replace("/", ".")
        if name not in weights or weights[name].shape != tensor.shape:
            there = tuple(weights[name].shape) if name in weights else "no such weight"
            raise ValueError(
                f"'{name}' in '{folder}' has shape {tuple(tensor.shape)}, this model {there}. Use the "
                "bridge, lora and language_model of that run."
            )
        weights[name].copy_(tensor)
    return network


def open_report_model(folder: str | Path, identity: Mapping[str, Any]) -> ReportModel:
    """Open what a finished run left, ready to write.

    Args:
        folder: its output_dir.
        identity: facts of the embeddings to write about, with ``dim``.

    Raises:
        FileNotFoundError: if the folder holds no such run.
        ValueError: if the embeddings are of another origin, or the tiny language model was left frozen: its
            weights are in no file.
    """
    card = read_card(folder)
    name, place = card["language_model"], Path(folder) / LANGUAGE
    if name == TINY:
        if card["phase"] != "full" or card["lora"] is not None:
            raise ValueError(f"The tiny language model of '{folder}' never learned. Train it in phase full.")
        import transformers

        config = transformers.LlamaConfig.from_pretrained(place)
        tokenizer = transformers.AutoTokenizer.from_pretrained(place)
        language = LanguageModel(transformers.LlamaForCausalLM(config), tokenizer, name)
    else:
        language = open_language_model(name, texts=(), tiny={}, dtype=card["lm_dtype"], seed=0)
    bridge = Bridge(
        standardizer=Standardizer((), identity["dim"]),
        lm_dim=language.model.get_input_embeddings().embedding_dim,
        kind=card["bridge"],
        num_tokens=card["num_tokens"],
        num_zones=card["num_zones"],
        width=card["bridge_width"],
        num_layers=card["bridge_layers"],
        num_heads=card["bridge_heads"],
    )
    network = ReportModel(
        bridge,
        language,
        **{name: card[name] for name in ("prompt", "phase", "lora", "cross_layers")},
        seed=0,
    )
    return begin_with(network, folder, identity).eval()
