"""tiktoken.model of a released Kimi Linear repository -> `tokenizer.json` that AutoTokenizer loads without remote code.

Ids, for n mergeable ranks (released: n = 163,584):

    0 .. n-1           byte-level BPE tokens, id = tiktoken rank
    n .. n+slots-1     special slots: [BOS] n, [EOS] n+1, <|im_end|> n+2, ... [PAD] n+255; else `<|reserved_token_ID|>`

The official tokenizer numbers 258 slots (ids up to 163,841) while the embedding has 163,840 rows. A slot without a row
would make the model index out of range, so `tokenizer.json` holds only ids below the model's vocab_size; the two names
beyond it are ordinary text.

Where the fast tokenizer differs from tiktoken behind the official class:

* A Python string with a lone surrogate is refused by `tokenizers` (TypeError), while tiktoken reads it as U+FFFD.
  No setting of `tokenizer.json` changes that; `replace_lone_surrogates` does what tiktoken does.
* The official class cuts text every 400,000 characters, and runs of more than 25,000 whitespace or non-whitespace
  characters; here a text is never cut, so tokens may differ at those cuts.
"""

import base64
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter, bytes_to_unicode

# Class intersection (&&) and \p{Han} need Oniguruma or Rust fancy-regex; Python's `re` cannot read this pattern.
SPLIT_PATTERN = "|".join(
    [
        r"[\p{Han}]+",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)

OFFICIAL_SLOTS = 258
EMBEDDED_SLOTS = 256

# Offsets from the number of mergeable ranks. This table is verified for this model, save <|im_system|> (seen in the
# Kimi K2 family only), without which no system turn can be written. [PAD] and [UNK] come last: see `special_tokens`.
LAYOUT_OFFSETS = {
    "[BOS]": 0,
    "[EOS]": 1,
    "<|im_end|>": 2,
    "<|im_user|>": 3,
    "<|im_assistant|>": 4,
    "<|im_system|>": 10,
    "<|im_middle|>": 17,
}
# Seen in the Kimi K2 family only: used when the source folder names no token at all.
FAMILY_OFFSETS = {"<|start_header_id|>": 6, "<|end_header_id|>": 7, "[EOT]": 9}
# Tokens of tool calls, seen in the family only; they name the slots that the source folder leaves unnamed.
TOOL_OFFSETS = {
    "<|tool_calls_section_begin|>": 11,
    "<|tool_calls_section_end|>": 12,
    "<|tool_call_begin|>": 13,
    "<|tool_call_argument_begin|>": 14,
    "<|tool_call_end|>": 15,
}
MIN_SLOTS = max(LAYOUT_OFFSETS.values()) + 3

CHAT_TOKENS = tuple(name for name in LAYOUT_OFFSETS if name.startswith("<|im_"))
CHAT_TEMPLATE_FILE = "chat_template.jinja"


def read_tiktoken_ranks(path: Path) -> dict[bytes, int]:
    """Read and check a tiktoken file: one `<base64 token> <rank>` a line, the ranks being 0 .. n-1.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: malformed line, repeated token or rank, missing rank, or missing single-byte token.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: point to a folder that holds the repository's tiktoken.model")
    ranks: dict[bytes, int] = {}
    line_of_rank: dict[int, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            encoded, rank_text = line.split()
            token, rank = base64.b64decode(encoded, validate=True), int(rank_text)
        except ValueError as error:
            raise ValueError(
                f"{path}, line {number}: {line[:80]!r} is not '<base64 token> <rank>'; download the file again "
                "(a Git LFS pointer or a cut download looks like this)"
            ) from error
        if token in ranks or rank in line_of_rank:
            first = line_of_rank[ranks.get(token, rank)]
            raise ValueError(f"{path}, line {number}: token {token!r} or rank {rank} is already on line {first}")
        ranks[token] = rank
        line_of_rank[rank] = number
    _check_ranks(ranks, str(path))
    return ranks


def _check_ranks(ranks: Mapping[bytes, int], where: str) -> None:
    """Raise ValueError unless the ranks are 0 .. n-1 and every single byte is a token, as byte-level BPE needs."""
    missing_byte = next((byte for byte in range(256) if bytes([byte]) not in ranks), None)
    if missing_byte is not None:
        raise ValueError(f"{where}: no token for the single byte 0x{missing_byte:02x}; some texts could not be encoded")
    if b"" in ranks:
        raise ValueError(f"{where}: rank {ranks[b'']} is an empty token; remove it")
    used = set(ranks.values())
    gap = next((rank for rank in range(len(ranks)) if rank not in used), None)
    if gap is not None:
        raise ValueError(
            f"{where}: {len(ranks)} tokens, but rank {gap} is missing and the largest is {max(used)}; the ranks must "
            f"be 0 to {len(ranks) - 1} without gaps, because the special tokens start right after them"
        )


def special_tokens(
    num_ranks: int, slots: int = EMBEDDED_SLOTS, named: Mapping[int, AddedToken] | None = None
) -> list[AddedToken]:
    """The tokens of ids num_ranks .. num_ranks + slots - 1, in order.

    Args:
        num_ranks: number of mergeable ranks, which is the first special id.
        slots: number of special ids; the released model has rows for 256. With fewer, [UNK] and [PAD] are the last two.
        named: tokens by id, from the repository's `added_tokens_decoder`. Those names win; ours fill the ids left out.

    Raises:
        ValueError: too few slots, an id among the mergeable ranks, one name at two ids, or a chat token without an id.
    """
    if not MIN_SLOTS <= slots <= OFFICIAL_SLOTS:
        raise ValueError(
            f"slots = {slots}, but the layout needs {MIN_SLOTS} to {OFFICIAL_SLOTS} special ids: "
            f"choose a vocab_size of at least {num_ranks} ranks + {MIN_SLOTS}"
        )
    names: dict[int, AddedToken] = {}
    for token_id, token in (named or {}).items():
        if token_id < num_ranks:
            raise ValueError(
                f"added_tokens_decoder names id {token_id} {token.content!r}, which is one of the {num_ranks} "
                "mergeable ranks: tokenizer_config.json and tiktoken.model are not from the same repository"
            )
        if token_id < num_ranks + slots:
            names[token_id] = token
        elif not token.content.startswith("<|reserved_token_"):
            raise ValueError(
                f"added_tokens_decoder names id {token_id} {token.content!r}, which has no row in an embedding of "
                f"{num_ranks + slots}: pass the model's own vocab_size"
            )
    last = min(slots, EMBEDDED_SLOTS) - 1
    offsets = LAYOUT_OFFSETS | TOOL_OFFSETS | {"[PAD]": last}
    if not named:
        offsets |= FAMILY_OFFSETS | {"[UNK]": last - 1}
    taken = {token.content for token in names.values()}
    for name, offset in offsets.items():
        if name not in taken:
            # Decoding leaves out special tokens, but a call must be read out of the text.
            names.setdefault(num_ranks + offset, _added_token(name, special=name not in TOOL_OFFSETS))
    tokens = [names.get(i) or _added_token(f"<|reserved_token_{i}|>") for i in range(num_ranks, num_ranks + slots)]
    contents = [token.content for token in tokens]
    for token_id, content in enumerate(contents, start=num_ranks):
        first = num_ranks + contents.index(content)
        if first != token_id:
            raise ValueError(f"added_tokens_decoder: {content!r} stands at ids {first} and {token_id}; keep one")
    for name in CHAT_TOKENS:
        if name not in contents:
            offset = LAYOUT_OFFSETS[name]
            raise ValueError(
                f"chat token {name} has no id: added_tokens_decoder gives id {num_ranks + offset} the name "
                f"{contents[offset]!r}; this is not a Kimi Linear tokenizer"
            )
    return tokens


def _added_token(content: str, *, special: bool = True) -> AddedToken:
    # tiktoken cuts special tokens out of the raw text and leaves the blanks around them alone.
    return AddedToken(content, special=special, normalized=False, lstrip=False, rstrip=False, single_word=False)


class _RanksConverter(TikTokenConverter):
    """transformers' own converter, fed with checked ranks and the released split pattern."""

    def __init__(self, ranks: Mapping[bytes, int]) -> None:
        super().__init__(pattern=SPLIT_PATTERN)
        self.ranks = ranks

    def extract_vocab_merges_from_model(self, tiktoken_url: str | None) -> tuple[dict[str, int], list[tuple[str, str]]]:
        """Vocabulary and merges in the byte-level alphabet, the merges in order of the rank of their result.

        Every split of a token into two tokens is listed. Only one can ever arise: merges inside a stretch of bytes do
        not depend on what stands around it, so two neighbours that make a token are always the two that tiktoken gets
        from its bytes alone.
        Overridden because transformers' version reads the file through tiktoken's cache, which is keyed by path.
        """
        alphabet = bytes_to_unicode()
        ranks = self.ranks
        vocab = {"".join(alphabet[byte] for byte in token): rank for token, rank in ranks.items()}
        merges = []
        for token in tqdm(sorted(ranks, key=ranks.__getitem__), desc="merges", unit=" tokens", disable=None):
            text = "".join(alphabet[byte] for byte in token)
            merges += [(text[:i], text[i:]) for i in range(1, len(token)) if token[:i] in ranks and token[i:] in ranks]
        return vocab, merges


def build_tokenizer(
    ranks: Mapping[bytes, int], *, slots: int = EMBEDDED_SLOTS, named: Mapping[int, AddedToken] | None = None
) -> Tokenizer:
    """A `tokenizers.Tokenizer` that encodes as tiktoken does with these ranks, SPLIT_PATTERN and allowed_special="all".

    Nothing is added around the text: no BOS, no EOS. `slots` and `named`: see `special_tokens`.

    Raises:
        ValueError: ranks that are not 0 .. n-1 over all bytes, or special tokens that do not fit.
    """
    _check_ranks(ranks, "ranks")
    tokens = special_tokens(len(ranks), slots, named)
    tokenizer = _RanksConverter(ranks).converted()
    tokenizer.add_tokens(tokens)
    for token_id, token in enumerate(tokens, start=len(ranks)):
        if tokenizer.token_to_id(token.content) != token_id:
            raise ValueError(
                f"special token {token.content!r} (id {token_id}) is also an ordinary token, id "
                f"{ranks.get(token.content.encode())}: rename it in added_tokens_decoder"
            )
    return tokenizer


def train_small_tokenizer(texts: Iterable[str], num_ranks: int) -> dict[bytes, int]:
    """Train a byte-level BPE with the released split pattern, for small checkpoints and tests.

    Returns:
        Ranks for `write_tokenizer_folder`: the 256 bytes, then the merged tokens, most frequent first.

    Raises:
        ValueError: `num_ranks` below 256, or more than the texts yield.
    """
    if num_ranks < 256:
        raise ValueError(f"num_ranks = {num_ranks}, but the 256 single bytes are tokens already: ask for 256 or more")
    tokenizer = _RanksConverter({bytes([byte]): byte for byte in range(256)}).converted()
    trainer = trainers.BpeTrainer(
        vocab_size=num_ranks, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    vocab = tokenizer.get_vocab()
    if len(vocab) != num_ranks:
        raise ValueError(f"the texts yield {len(vocab)} tokens, not {num_ranks}: give more text or ask for fewer")
    byte_of = {char: byte for byte, char in bytes_to_unicode().items()}
    return {bytes(byte_of[char] for char in text): rank for text, rank in vocab.items()}


def write_tokenizer_folder(
    ranks: Mapping[bytes, int],
    out: Path,
    *,
    slots: int = EMBEDDED_SLOTS,
    named: Mapping[int, AddedToken] | None = None,
    tokenizer_config: Mapping[str, Any] | None = None,
    generation_config: Mapping[str, Any] | None = None,
    chat_template: str | None = None,
) -> PreTrainedTokenizerFast:
    """Write tokenizer.json, tokenizer_config.json, chat_template.jinja and generation_config.json, and load the result.

    Args:
        ranks: token bytes to id, 0 .. n-1.
        out: folder, made if needed; the four files are overwritten, others are left alone.
        slots: number of special ids. The model's vocab_size must be at least len(ranks) + slots.
        named: special tokens by id, see `special_tokens`.
        tokenizer_config: settings that win over the defaults (bos_token, eos_token, pad_token, unk_token, padding_side,
            model_max_length); the others are not read.
        generation_config: settings to keep; the stop ids are extended, bos and pad ids filled in.
        chat_template: Jinja text; by default the chat layout of this package.

    Raises:
        ValueError: ranks or special tokens that do not fit together.
    """
    settings = dict(tokenizer_config or {})
    tokenizer = build_tokenizer(ranks, slots=slots, named=named)
    special_ids = {token.content: token_id for token_id, token in tokenizer.get_added_tokens_decoder().items()}
    written = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    for role, default in {"bos": "[BOS]", "eos": "[EOS]", "pad": "[PAD]", "unk": "[UNK]"}.items():
        name = _content(settings.get(f"{role}_token"), default)
        if name in special_ids:
            written[f"{role}_token"] = name
        elif role != "unk":
            raise ValueError(
                f"{role}_token {name!r} is not among the special tokens; name its id in added_tokens_decoder"
            )
    written["additional_special_tokens"] = list(CHAT_TOKENS)
    # The continuation of a padded prompt must touch the prompt; training does not care on which side the padding is.
    written["padding_side"] = settings.get("padding_side", "left")
    if "model_max_length" in settings:
        written["model_max_length"] = settings["model_max_length"]

    if chat_template is None:
        chat_template = Path(__file__).with_name(CHAT_TEMPLATE_FILE).read_text(encoding="utf-8")
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(out / "tokenizer.json"))
    _write_json(out / "tokenizer_config.json", written)
    _write_json(out / "generation_config.json", _generation_config(special_ids, written, generation_config or {}))
    (out / CHAT_TEMPLATE_FILE).write_text(chat_template, encoding="utf-8")
    return PreTrainedTokenizerFast.from_pretrained(out)


def _generation_config(
    special_ids: Mapping[str, int], tokenizer_config: Mapping[str, Any], kept: Mapping[str, Any]
) -> dict[str, Any]:
    """A chat turn stops at <|im_end|>, plain text at [EOS]; stop ids of the source are kept behind them."""
    bos, eos, pad = (special_ids[tokenizer_config[f"{role}_token"]] for role in ("bos", "eos", "pad"))
    more = kept.get("eos_token_id") or []
    stops = [special_ids["<|im_end|>"], eos, *(more if isinstance(more, list) else [more])]
    return {"bos_token_id": bos, "pad_token_id": pad} | dict(kept) | {"eos_token_id": list(dict.fromkeys(stops))}


def convert_tiktoken_folder(
    source: Path, out: Path, *, vocab_size: int | None = None, chat_template: str | None = None
) -> PreTrainedTokenizerFast:
    """Turn the tokenizer files of a released repository into files that AutoTokenizer loads without remote code.

    Read from `source`: tiktoken.model and, where present, tokenizer_config.json, special_tokens_map.json,
    generation_config.json, config.json (vocab_size, model_max_length) and chat_template.jinja.
    Written to `out`: see `write_tokenizer_folder`.

    Args:
        source: folder of the released repository.
        out: another folder.
        vocab_size: rows of the model's embedding; by default config.json's, else ranks + 256 as released.
        chat_template: Jinja text; by default the repository's own template, else this package's.

    Raises:
        FileNotFoundError: no tiktoken.model.
        ValueError: malformed files, a vocab_size without room for the special tokens, or out equal to source.
    """
    source, out = Path(source), Path(out)
    if source.resolve() == out.resolve():
        raise ValueError(f"out {out} is the source folder, whose tokenizer_config.json would be lost; choose another")
    ranks = read_tiktoken_ranks(source / "tiktoken.model")
    config = _read_json(source / "config.json")
    tokenizer_config = _read_json(source / "special_tokens_map.json") | _read_json(source / "tokenizer_config.json")
    if "model_max_length" not in tokenizer_config and "model_max_length" in config:
        tokenizer_config["model_max_length"] = config["model_max_length"]
    if vocab_size is None:
        vocab_size = config.get("vocab_size", len(ranks) + EMBEDDED_SLOTS)
    if vocab_size < len(ranks) + MIN_SLOTS:
        raise ValueError(
            f"vocab_size = {vocab_size} leaves no room for {MIN_SLOTS} special tokens behind the {len(ranks)} ranks of "
            f"{source / 'tiktoken.model'}: the tokenizer is not this model's"
        )
    named = {
        int(token_id): _added_token(
            _content(token, ""), special=not isinstance(token, dict) or token.get("special", True)
        )
        for token_id, token in tokenizer_config.get("added_tokens_decoder", {}).items()
    }
    return write_tokenizer_folder(
        ranks,
        out,
        slots=min(vocab_size - len(ranks), OFFICIAL_SLOTS),
        named=named,
        tokenizer_config=tokenizer_config,
        generation_config=_read_json(source / "generation_config.json"),
        chat_template=chat_template or _own_template(source, tokenizer_config),
    )


def _own_template(source: Path, tokenizer_config: Mapping[str, Any]) -> str | None:
    """The chat template of the repository, from its file or its tokenizer config; None if it has none."""
    path = source / CHAT_TEMPLATE_FILE
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = tokenizer_config.get("chat_template")
    if isinstance(template, list):
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    return template


def replace_lone_surrogates(text: str) -> str:
    """`text` as tiktoken reads it: surrogate pairs joined, lone surrogates replaced by U+FFFD.

    The fast tokenizer raises TypeError on a string with surrogates; pass such text through here first.
    """
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _content(token: str | Mapping[str, Any] | None, default: str) -> str:
    """The text of a token written as a string or as an AddedToken dictionary."""
    if isinstance(token, Mapping):
        token = token["content"]
    return default if token is None else token


def _read_json(path: Path) -> dict[str, Any]:
    """The dictionary in `path`, empty if there is no such file; ValueError if it is not JSON."""
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON ({error}); download it again") from error


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
