"""Where the text attack gets its replacement words from.

Four generators with one method, :meth:`WordCandidates.propose`: a masked language model (as in BERT-Attack, Li et al.,
EMNLP 2020, which Co-Attack, SGA, DRA and SA-AET use), the neighbours in a table of token embeddings, the fillers of the
same context in a list of captions, and a table of synonyms.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice, pairwise, product
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import yaml
from torch import Tensor
from torch.nn import functional

# Logits are [tokens, vocabulary] in float32: 4,096 tokens of BERT are half a gigabyte.
_TOKENS_PER_FORWARD = 4096
_MEMO_SIZE = 4096  # captions and words; a batch needs its own only
_QUERIES_PER_PRODUCT = 256


class WordCandidates(Protocol):
    """Proposes words for one place of a caption.

    A generator may also have ``prepare(captions)``, called once per batch with the captions whose words will be asked
    for, and ``num_rejected_multiword``, how many proposals of several words it has dropped so far.
    """

    def propose(self, words: Sequence[str], index: int, k: int) -> list[tuple[str, float]]:
        """At most about ``k`` pairs (word, score) for ``words[index]``, best (highest score) first."""
        ...


class _Memo(OrderedDict):
    """Forgets the oldest entry when it is full."""

    def __setitem__(self, key: Any, value: Any) -> None:
        super().__setitem__(key, value)
        if len(self) > _MEMO_SIZE:
            self.popitem(last=False)


@dataclass(eq=False)
class _Prediction:
    """What the language model says of one caption."""

    spans: list[tuple[int, int]]  # of every word: its pieces, counted from 0 without [CLS]
    ids: list[list[int]]  # [rows, top_k], best first; row 0 is [CLS]
    logits: list[list[float]]  # [rows, top_k]
    joined: dict[int, list[tuple[tuple[int, ...], float]]] = field(default_factory=dict)
    """Words of several pieces: the combinations of pieces with −perplexity, best first."""


class MaskedLanguageModel:
    """Words that a masked language model finds likely at the place of a word that it can see.

    The model reads ``[CLS]`` and the pieces of the caption, nothing masked and no ``[SEP]``. A word of one piece gets the
    best ``top_k`` ids in the order of their logits, down to ``logit_threshold``; a word of several gets combinations of
    the best ids of its pieces, the likeliest first as a text of its own.

    Args:
        model: a masked language model of transformers, ``(input_ids, attention_mask) -> .logits [N, L, V]``.
        tokenizer: its WordPiece tokenizer (BERT, DistilBERT, ...).
        top_k: ids kept per piece, ≥ 1.
        logit_threshold: the smallest raw logit of a one-piece proposal; 0 switches the rule off.
        max_length: tokens of a caption, with ``[CLS]``, ≥ 4; a word that begins later gets no proposals.
        position_offset: 1 reads the predictions at the word itself. 0 reads them one token earlier, which is what the
            published figures were made with.
        bpe_topk: ids per piece of a word of several pieces, ≥ 1.
        bpe_max: combinations of such pieces, ≥ 1.
        bpe_pieces: pieces of a word looked at, ≥ 1.
        allow_multiword: keep proposals of several words, as the published figures do.
        allow_special: keep special tokens (``[UNK]``, ``[SEP]``, ...) as proposals, as the published figures do.

    Raises:
        ValueError: a number is outside its range, or the tokenizer is not of the WordPiece kind.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        tokenizer: Any,
        *,
        top_k: int = 10,
        logit_threshold: float = 0.3,
        max_length: int = 77,
        position_offset: int = 1,
        bpe_topk: int = 4,
        bpe_max: int = 24,
        bpe_pieces: int = 12,
        allow_multiword: bool = False,
        allow_special: bool = False,
    ) -> None:
        for name, value in {"top_k": top_k, "bpe_topk": bpe_topk, "bpe_max": bpe_max, "bpe_pieces": bpe_pieces}.items():
            if value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        longest = getattr(model.config, "max_position_embeddings", max_length)
        if not 4 <= max_length <= longest:
            raise ValueError(f"max_length is {max_length}; the language model takes from 4 to {longest} tokens")
        if position_offset not in (0, 1):
            raise ValueError(f"position_offset is {position_offset}; it is 1 (the word's own place) or 0 (one before)")
        if tokenizer.cls_token_id is None or not any(token.startswith("##") for token in tokenizer.get_vocab()):
            raise ValueError("the masked language model needs a WordPiece tokenizer with [CLS], such as BERT's")
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.top_k = top_k
        self.logit_threshold = logit_threshold
        self.max_length = max_length
        self.position_offset = position_offset
        self.bpe_topk = bpe_topk
        self.bpe_max = bpe_max
        self.bpe_pieces = bpe_pieces
        self.allow_multiword = allow_multiword
        self.num_rejected_multiword = 0
        self._vocab_size = int(model.config.vocab_size)
        self._barred = set() if allow_special else set(tokenizer.all_special_ids)
        self._memo: _Memo = _Memo()

    def respelled(self, caption: str) -> str:
        """The caption as the tokenizer writes its own pieces: what CLIP reads in the released code, ``[UNK]`` included."""
        pieces = self.tokenizer(caption, add_special_tokens=False, truncation=True, max_length=self.max_length - 2)
        return self.tokenizer.decode(pieces.input_ids)

    @classmethod
    def from_pretrained(
        cls, source: str | Path, *, device: torch.device | str = "cpu", **options: Any
    ) -> MaskedLanguageModel:
        """A model of the hub (``bert-base-uncased``) or of a local folder, with its tokenizer.

        Raises:
            ValueError: it is neither in a folder nor can it be downloaded, or an option is wrong.
        """
        import transformers
        from transformers.utils import logging

        shown = logging.is_progress_bar_enabled()
        logging.disable_progress_bar()
        try:
            with torch.random.fork_rng(devices=[]):  # weights are drawn before the saved ones are read
                model = transformers.AutoModelForMaskedLM.from_pretrained(source)
            tokenizer = transformers.AutoTokenizer.from_pretrained(source)
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ValueError(
                f"masked language model {str(source)!r} is not a folder with a saved model and cannot be downloaded "
                f"({reason}); give a folder that save_pretrained wrote, or another generator"
            ) from error
        finally:
            if shown:
                logging.enable_progress_bar()
        return cls(model.to(device), tokenizer, **options)

    def prepare(self, captions: Sequence[str]) -> None:
        """Read all captions that are new, in as few forwards as memory allows."""
        new = [caption for caption in dict.fromkeys(captions) if caption not in self._memo]
        self._memo.update(self._predict([caption.split(" ") for caption in new]))

    def propose(self, words: Sequence[str], index: int, k: int) -> list[tuple[str, float]]:
        """Single words with their logit (one piece) or −perplexity (several pieces), best first.

        ``k`` ids are looked at for a word of one piece; a word of several yields up to ``bpe_max`` combinations.

        Raises:
            ValueError: ``k`` is above ``top_k``.
        """
        if k > self.top_k:
            raise ValueError(f"{k} candidates are asked for, the language model keeps {self.top_k}; raise its top_k")
        caption = " ".join(words)
        if caption not in self._memo:
            self.prepare([caption])
        prediction = self._memo[caption]
        if index in prediction.joined:
            found = prediction.joined[index]
        else:
            found = self._above_threshold(prediction, index, k)
        return self._written_out(found)

    def _above_threshold(self, prediction: _Prediction, index: int, k: int) -> list[tuple[tuple[int, ...], float]]:
        found: list[tuple[tuple[int, ...], float]] = []
        for row in self._rows(prediction, index):
            for piece, logit in zip(prediction.ids[row][:k], prediction.logits[row], strict=False):
                if self.logit_threshold != 0 and logit < self.logit_threshold:
                    break
                found.append(((piece,), logit))
        return found

    def _written_out(self, found: Iterable[tuple[tuple[int, ...], float]]) -> list[tuple[str, float]]:
        proposals: dict[str, float] = {}
        for pieces, score in found:
            text = " ".join(self.tokenizer.convert_ids_to_tokens(list(pieces))).replace(" ##", "")
            if "##" in text or self._barred.intersection(pieces):  # no word begins with such a piece
                continue
            if " " in text and not self.allow_multiword:
                self.num_rejected_multiword += 1
            else:
                proposals.setdefault(text, score)
        return list(proposals.items())

    def _rows(self, prediction: _Prediction, index: int) -> range:
        """The rows of the predictions that stand for a word; none where it begins behind the cut."""
        start, stop = prediction.spans[index]
        if start > self.max_length - 2:
            return range(0)
        return range(start + self.position_offset, min(stop + self.position_offset, len(prediction.ids)))

    @torch.inference_mode()
    def _predict(self, captions: Sequence[Sequence[str]]) -> dict[str, _Prediction]:
        vocabulary = list(dict.fromkeys(word for words in captions for word in words))
        encoded = self.tokenizer(vocabulary, add_special_tokens=False)["input_ids"] if vocabulary else []
        pieces = dict(zip(vocabulary, encoded, strict=True))
        sequences = [
            [self.tokenizer.cls_token_id, *(piece for word in words for piece in pieces[word])][: self.max_length]
            for words in captions
        ]
        found: dict[str, _Prediction] = {}
        for chunk in _chunks(sequences):
            ids, mask = self._padded([sequences[i] for i in chunk])
            best = (
                self.model(input_ids=ids, attention_mask=mask)
                .logits.float()
                .topk(min(self.top_k, self._vocab_size), dim=-1)
            )
            for i, logits, tokens in zip(chunk, best.values.tolist(), best.indices.tolist(), strict=True):
                ends = np.cumsum([0, *(len(pieces[word]) for word in captions[i])]).tolist()
                length = len(sequences[i])
                spans = list(pairwise(ends))
                found[" ".join(captions[i])] = _Prediction(spans, tokens[:length], logits[:length])
        self._join_pieces(found.values())
        return {key: found[key] for key in (" ".join(words) for words in captions)}

    def _padded(self, sequences: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        longest = max(map(len, sequences))
        ids = torch.full((len(sequences), longest), self.tokenizer.pad_token_id or 0)
        mask = torch.zeros_like(ids)
        for row, sequence in enumerate(sequences):
            ids[row, : len(sequence)] = torch.tensor(sequence)
            mask[row, : len(sequence)] = 1
        device = next(self.model.parameters()).device
        return ids.to(device), mask.to(device)

    def _join_pieces(self, predictions: Iterable[_Prediction]) -> None:
        """Order the combinations of pieces of all words of several, one forward per number of pieces."""
        combinations: list[tuple[int, ...]] = []
        owners: list[tuple[_Prediction, int]] = []
        for prediction in predictions:
            for index in range(len(prediction.spans)):
                rows = self._rows(prediction, index)
                if len(rows) < 2:
                    continue
                choices = [prediction.ids[row][: self.bpe_topk] for row in rows[: self.bpe_pieces]]
                few = list(islice(product(*choices), self.bpe_max))
                combinations += few
                owners += [(prediction, index)] * len(few)
                prediction.joined[index] = []
        for length in sorted(set(map(len, combinations))):
            same = [i for i, pieces in enumerate(combinations) if len(pieces) == length]
            scores = self._perplexities([combinations[i] for i in same])
            for i, perplexity in zip(same, scores, strict=True):
                prediction, index = owners[i]
                prediction.joined[index].append((combinations[i], -perplexity))
        for prediction, index in dict.fromkeys(owners):
            prediction.joined[index].sort(key=lambda scored: -scored[1])  # stable: ties stay in row-major order

    def _perplexities(self, combinations: Sequence[tuple[int, ...]]) -> list[float]:
        """exp of the mean cross-entropy of each sequence of pieces, read without special tokens."""
        device = next(self.model.parameters()).device
        scores: list[float] = []
        for chunk in torch.tensor(combinations).split(max(1, _TOKENS_PER_FORWARD // len(combinations[0]))):
            ids = chunk.to(device)
            logits = self.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.float()
            scores += functional.cross_entropy(logits.mT, ids, reduction="none").mean(1).exp().tolist()
        return scores


def _chunks(sequences: Sequence[Sequence[int]]) -> Iterator[list[int]]:
    """Indices of sequences of like length whose padded batch stays within one forward."""
    chunk: list[int] = []
    for i in sorted(range(len(sequences)), key=lambda i: -len(sequences[i])):
        if chunk and (len(chunk) + 1) * len(sequences[chunk[0]]) > _TOKENS_PER_FORWARD:
            yield chunk
            chunk = []
        chunk.append(i)
    if chunk:
        yield chunk


class TokenEmbedding:
    """The nearest words in a table of token embeddings, by cosine.

    Args:
        words: V words, one per row of ``vectors``; those that are not alphabetic are left out.
        vectors: [V, D].
        tokenize: word -> [P, D], the vectors of its tokens, which are averaged; [0, D] where the word is unknown.

    Raises:
        ValueError: there are not as many words as rows, or no word is alphabetic.
    """

    def __init__(self, words: Sequence[str], vectors: Tensor, tokenize: Callable[[str], Tensor]) -> None:
        if len(words) != len(vectors):
            raise ValueError(f"{len(words)} words and {len(vectors)} vectors; give one vector per word")
        kept = [i for i, word in enumerate(words) if word.isascii() and word.isalpha()]
        if not kept:
            raise ValueError("the table of token embeddings has no alphabetic word")
        self.words = [words[i] for i in kept]
        self._rows = {word: row for row, word in enumerate(self.words)}
        self._vectors = functional.normalize(vectors[kept].detach().float(), dim=1)
        self._tokenize = tokenize
        self._memo: _Memo = _Memo()

    def prepare(self, captions: Sequence[str]) -> None:
        """Find the neighbours of all new words with few matrix products."""
        words = dict.fromkeys(word for caption in captions for word in caption.split(" "))
        self._remember([word for word in words if word not in self._memo], 32)

    def propose(self, words: Sequence[str], index: int, k: int) -> list[tuple[str, float]]:
        """The ``k`` nearest words with their cosine."""
        word = words[index]
        if word not in self._memo or self._memo[word][0] < k:
            self._remember([word], k)
        return self._memo[word][1][:k]

    def _remember(self, words: Sequence[str], k: int) -> None:
        embedded = {word: vectors.detach().float() for word in words if len(vectors := self._tokenize(word))}
        self._memo.update({word: (k, []) for word in words if word not in embedded})
        known = list(embedded)
        for first in range(0, len(known), _QUERIES_PER_PRODUCT):
            some = known[first : first + _QUERIES_PER_PRODUCT]
            queries = functional.normalize(torch.stack([embedded[word].mean(dim=0) for word in some]), dim=1)
            cosines = queries @ self._vectors.to(queries.device).T
            for row, word in enumerate(some):  # a word is not its own neighbour
                if word in self._rows:
                    cosines[row, self._rows[word]] = -torch.inf
            best = cosines.topk(min(k, len(self.words)), dim=1)
            for word, scores, rows in zip(some, best.values.tolist(), best.indices.tolist(), strict=True):
                near = [(self.words[row], score) for row, score in zip(rows, scores, strict=True) if score > -np.inf]
                self._memo[word] = (k, near)


class _Fillers:
    """How often each word was seen in each context, for contexts numbered by int64."""

    def __init__(self, contexts: np.ndarray, words: np.ndarray, num_words: int) -> None:
        self._contexts, numbers = np.unique(contexts, return_inverse=True)
        pairs, self._counts = np.unique(numbers.astype(np.int64) * num_words + words, return_counts=True)
        self._words = pairs % num_words
        self._starts = np.searchsorted(pairs // num_words, np.arange(len(self._contexts) + 1))

    def seen(self, context: int) -> tuple[np.ndarray, np.ndarray]:
        """The words seen in a context, ascending, and how often; both empty for a new context."""
        number = int(np.searchsorted(self._contexts, context))
        if number == len(self._contexts) or self._contexts[number] != context:
            return self._words[:0], self._counts[:0]
        inside = slice(self._starts[number], self._starts[number + 1])
        return self._words[inside], self._counts[inside]


class ContextCounts:
    """Words that stood between the same neighbours in a list of captions; made by :meth:`fit`.

    score(w) = log(0.7 p(w | left, right) + 0.15 p(w | left) + 0.15 p(w | right) + 0.01 p(w) + 1e-12), where every
    probability is a share of the places of the list with that neighbour; the ends of a caption count as neighbours.
    Scored are the words seen between both neighbours and the 50 commonest next to either.
    """

    num_bigram_fillers = 50

    def __init__(self, words: Sequence[str], places: np.ndarray) -> None:
        """``words`` ascending; ``places`` [N, 3]: numbers of left neighbour, word, right neighbour (end: len(words))."""
        self._words = list(words)
        self._numbers = {word: number for number, word in enumerate(self._words)}
        self._end = len(self._words)
        left, word, right = places.T
        self._between = _Fillers(left * (self._end + 1) + right, word, self._end)
        self._after = _Fillers(left, word, self._end)
        self._before = _Fillers(right, word, self._end)
        self._shares = np.bincount(word, minlength=self._end) / len(places)

    @classmethod
    def fit(cls, captions: Iterable[str]) -> ContextCounts:
        """Count the words of cleaned captions.

        Raises:
            ValueError: the captions hold no word.
        """
        split = [caption.split() for caption in captions]
        vocabulary = sorted({word for words in split for word in words})
        if not vocabulary:
            raise ValueError("the captions to count hold no word; give at least one caption")
        numbers = {word: number for number, word in enumerate(vocabulary)}
        end = len(vocabulary)
        flat = [end]
        for words in split:
            flat += [numbers[word] for word in words]
            flat.append(end)
        stream = np.array(flat, dtype=np.int64)
        places = np.stack([stream[:-2], stream[1:-1], stream[2:]], axis=1)
        return cls(vocabulary, places[places[:, 1] != end])

    def propose(self, words: Sequence[str], index: int, k: int) -> list[tuple[str, float]]:
        """The ``k`` words of the highest score; equal scores in alphabetical order."""
        left, right = self._number(words, index - 1), self._number(words, index + 1)
        between = self._between.seen(-1 if min(left, right) < 0 else left * (self._end + 1) + right)
        after, before = self._after.seen(left), self._before.seen(right)
        commonest = [_commonest(*seen, self.num_bigram_fillers) for seen in (after, before)]
        fillers = np.unique(np.concatenate([between[0], *commonest]))
        fillers = fillers[fillers != self._numbers.get(words[index], -1)]
        probability = 0.01 * self._shares[fillers] + 1e-12
        for weight, seen in ((0.7, between), (0.15, after), (0.15, before)):
            probability += weight * _shares(*seen, fillers)
        best = np.argsort(-probability, kind="stable")[:k]
        return [(self._words[fillers[i]], float(np.log(probability[i]))) for i in best]

    def _number(self, words: Sequence[str], index: int) -> int:
        """Number of a neighbour; −1 for a word that was never seen."""
        return self._numbers.get(words[index], -1) if 0 <= index < len(words) else self._end


def _commonest(words: np.ndarray, counts: np.ndarray, num: int) -> np.ndarray:
    return words[np.argsort(-counts, kind="stable")[:num]]


def _shares(words: np.ndarray, counts: np.ndarray, asked: np.ndarray) -> np.ndarray:
    """counts / counts.sum() of the words asked for; 0 for those that are not among ``words`` (ascending)."""
    if len(words) == 0:
        return np.zeros(len(asked))
    where = np.minimum(np.searchsorted(words, asked), len(words) - 1)
    return np.where(words[where] == asked, counts[where] / counts.sum(), 0.0)


class Synonyms:
    """A table ``{word: [words]}``: the only generator that can promise to keep the meaning.

    Args:
        table: replacements of each word, best first; lower-cased.
        allow_multiword: keep replacements of several words.

    Raises:
        ValueError: an entry is not a word with a list of words.
    """

    def __init__(self, table: Mapping[str, Sequence[str]], *, allow_multiword: bool = False) -> None:
        if not isinstance(table, Mapping):
            raise ValueError(f"the synonyms are {type(table).__name__}; give a table {{word: [words]}}")
        for word, replacements in table.items():
            listed = isinstance(replacements, Sequence) and not isinstance(replacements, str)
            if not isinstance(word, str) or not word.strip():
                raise ValueError(f"synonyms entry {word!r}: the key is not a word; put words like yes or 7 in quotes")
            if not listed or not all(isinstance(other, str) and other.strip() for other in replacements):
                raise ValueError(f"synonyms entry {word!r}: {replacements!r} is not a list of words")
        self.allow_multiword = allow_multiword
        self.num_rejected_multiword = 0
        self._table = {
            word.strip().lower(): [" ".join(other.lower().split()) for other in others]
            for word, others in table.items()
        }

    @classmethod
    def from_file(cls, path: str | Path, *, allow_multiword: bool = False) -> Synonyms:
        """Read a ``.json``, ``.yaml`` or ``.yml`` file.

        Raises:
            ValueError: the file is not there, is of another kind or holds no such table.
        """
        path = Path(path).expanduser()
        readers: dict[str, Callable[[str], Any]] = dict.fromkeys((".yaml", ".yml"), yaml.safe_load)
        readers[".json"] = json.loads
        if path.suffix.lower() not in readers:
            raise ValueError(f"synonyms file {path} ends in {path.suffix!r}; use .yaml, .yml or .json")
        try:
            table = readers[path.suffix.lower()](path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ValueError(f"synonyms file {path} cannot be read: {error.strerror}") from error
        except (ValueError, yaml.YAMLError) as error:
            raise ValueError(f"synonyms file {path} is not valid {path.suffix[1:].upper()}: {error}") from error
        try:
            return cls(table, allow_multiword=allow_multiword)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    def propose(self, words: Sequence[str], index: int, k: int) -> list[tuple[str, float]]:
        """The first ``k`` replacements; the score is minus the place in the list."""
        proposals: list[tuple[str, float]] = []
        for place, word in enumerate(self._table.get(words[index].lower(), ())):
            if " " in word and not self.allow_multiword:
                self.num_rejected_multiword += 1
            else:
                proposals.append((word, -float(place)))
        return proposals[:k]
