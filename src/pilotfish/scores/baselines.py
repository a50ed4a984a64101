"""Labelled texts in; what words alone, or length alone, say of other texts out.

A head that does not beat them has learned the vocabulary of its training texts, not more.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from pilotfish.errors import SettingError, TextError
from pilotfish.scores.metrics import auroc
from pilotfish.texts import TokenizedText

if TYPE_CHECKING:
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

WINDOW = 64
"""Characters, up to and including those of a token, that the token is scored by."""
STRENGTHS = (0.1, 1.0, 10.0)
"""Inverse regularisation strengths to choose from on training documents that are held out for it."""
HELD_OUT = 4
"""One document in so many is held out for that choice."""


def token_words(
    train: Sequence[TokenizedText],
    labels: Sequence[Float[Tensor, " _"]],  # texts differ in length
    test: Sequence[TokenizedText],
    *,
    generator: torch.Generator,
    max_tokens: int = 50_000,
) -> list[Float[Tensor, " _"]]:
    """Log-odds of every token of each test text by the characters just before it, as a monitor of words could.

    TF-IDF of the character n-grams of a window, and logistic regression on labelled tokens, drawn uniformly. A score
    depends on no character after its token.

    Args:
        labels: For each training text one a token; 0.5 and more are positive, NaN is unlabelled.
        max_tokens: Training tokens at most.

    Raises:
        SettingError: scikit-learn is not installed.
        TextError: the training texts lack positive or negative tokens.
    """
    require_sklearn()
    known = [(text, token) for text, row in enumerate(labels) for token in row.isfinite().nonzero()[:, 0].tolist()]
    drawn = torch.randperm(len(known), generator=generator)[:max_tokens].tolist()
    rows = sorted(known[index] for index in drawn)
    is_positive = np.array([bool(labels[text][token] >= 0.5) for text, token in rows], dtype=bool)
    _check_both(is_positive, "tokens")
    windows = list(map(_windows, train))
    vectorizer = _tfidf("char", (1, 4))
    features = vectorizer.fit_transform([windows[text][token] for text, token in rows])
    model = _fitted(features, is_positive, [train[text].group for text, _ in rows])
    return [torch.from_numpy(model.decision_function(vectorizer.transform(_windows(text)))) for text in test]


def response_words(
    train: Sequence[TokenizedText], labels: Float[Tensor, " train"], test: Sequence[TokenizedText]
) -> Float[Tensor, " test"]:
    """Log-odds of every test text from TF-IDF of its words and of its character n-grams, as far as its tokens go.

    Args:
        labels: One a training text; 0.5 and more are positive, NaN is unlabelled.

    Raises:
        SettingError: scikit-learn is not installed.
        TextError: the training texts lack positive or negative ones.
    """
    require_sklearn()
    from sklearn.pipeline import FeatureUnion

    known, is_positive = _labelled(train, labels)
    vectorizer = FeatureUnion([("words", _tfidf("word", (1, 2))), ("characters", _tfidf("char", (2, 4)))])
    model = _fitted(vectorizer.fit_transform(list(map(_as_read, known))), is_positive, [text.group for text in known])
    return torch.from_numpy(model.decision_function(vectorizer.transform(list(map(_as_read, test)))))


def response_length(
    train: Sequence[TokenizedText],
    labels: Float[Tensor, " train"],
    train_sizes: Int[Tensor, " train"],
    test_sizes: Int[Tensor, " test"],
) -> Float[Tensor, " test"]:
    """Log-odds of every test response from its number of tokens alone, 1 or more; the rest as for `response_words`."""
    require_sklearn()
    known, is_positive = _labelled(train, labels)
    model = _fitted(_log(train_sizes[labels.isfinite()]), is_positive, [text.group for text in known])
    return torch.from_numpy(model.decision_function(_log(test_sizes)))


def require_sklearn() -> None:
    """Raises `SettingError` when scikit-learn is not installed."""
    try:
        import sklearn  # noqa: F401
    except ModuleNotFoundError as error:
        raise SettingError(
            "the word baselines need scikit-learn, which is not installed; run `pip install 'pilotfish[evaluate]'`, or "
            "leave the baselines out"
        ) from error


def _ends(text: TokenizedText) -> list[int]:
    """Per token, how many characters have been read with it; BOS and EOS, which have none, add nothing."""
    return list(accumulate((end for _, end in text.offsets), max))


def _windows(text: TokenizedText) -> list[str]:
    return [text.text[max(0, end - WINDOW) : end] for end in _ends(text)]


def _as_read(text: TokenizedText) -> str:
    """The text up to where its tokens were cut."""
    return text.text[: _ends(text)[-1]]


def _log(sizes: Int[Tensor, " text"]) -> Float[np.ndarray, "text 1"]:
    return sizes.double().log().numpy()[:, None]


def _tfidf(analyzer: str, ngrams: tuple[int, int]) -> TfidfVectorizer:
    from sklearn.feature_extraction.text import TfidfVectorizer

    words = r"\w+|[^\w\s]" if analyzer == "word" else None
    return TfidfVectorizer(
        analyzer=analyzer, ngram_range=ngrams, lowercase=False, sublinear_tf=True, token_pattern=words
    )


def _labelled(
    texts: Sequence[TokenizedText], labels: Float[Tensor, " text"]
) -> tuple[list[TokenizedText], Bool[np.ndarray, " labelled"]]:
    known = labels.isfinite()
    is_positive = (labels[known] >= 0.5).numpy()
    _check_both(is_positive, "texts")
    return [text for text, is_known in zip(texts, known.tolist(), strict=True) if is_known], is_positive


def _check_both(is_positive: Bool[np.ndarray, " row"], what: str) -> None:
    num_positive = int(is_positive.sum())
    if not 0 < num_positive < len(is_positive):
        raise TextError(
            f"a baseline needs positive and negative training {what}; given were {num_positive} positive, "
            f"{len(is_positive) - num_positive} negative"
        )


def _fitted(
    features: Any,  # a scipy or numpy matrix, row by feature
    is_positive: Bool[np.ndarray, " row"],
    groups: Sequence[str],
) -> LogisticRegression:
    """Logistic regression on all rows, as strong as was best on held-out documents; 1 when those are too few."""
    from sklearn.linear_model import LogisticRegression

    def fitted(strength: float, rows: Bool[np.ndarray, " row"]) -> LogisticRegression:
        model = LogisticRegression(C=strength, solver="liblinear", class_weight="balanced", max_iter=1000)
        return model.fit(features[rows], is_positive[rows])

    held = np.isin(groups, sorted(set(groups))[::HELD_OUT])
    both = all(len(set(is_positive[side])) == 2 for side in (held, ~held))
    quality = {
        strength: auroc(
            torch.from_numpy(fitted(strength, ~held).decision_function(features[held])),
            torch.from_numpy(is_positive[held]).double(),
        )
        for strength in (STRENGTHS if both else ())
    }
    return fitted(max(quality, key=quality.__getitem__, default=1.0), np.ones_like(held))
