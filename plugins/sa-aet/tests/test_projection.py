import warnings

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from plait_sa_aet.sa_aet import SemanticProjection, caption_targets, draw_corpus, semantic_projection, similarity_loss
from safetensors.torch import load_file, save_file


def quietly(corpus, mode="drop_top", **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return semantic_projection(corpus, mode, **options)


def features(count, width, seed, common=0.0):
    generator = torch.Generator().manual_seed(seed)
    rows = F.normalize(torch.randn(count, width, generator=generator), dim=-1)
    return F.normalize(rows + common * rows[:1], dim=-1)


def test_by_hand():
    P = semantic_projection(torch.tensor([[1.0, 0], [1, 0], [0, 1]]))
    assert P.basis.abs().tolist() == pytest.approx([1, 0])
    torch.testing.assert_close(P.matrix(), torch.tensor([[0.0, 0], [0, 1]], dtype=torch.float64))
    assert P.singular_values.tolist() == pytest.approx([2**0.5, 1])
    assert P.rho_1 == pytest.approx(2 / 3)
    images = torch.tensor([[0.6, 0.8], [0.8, 0.6]], requires_grad=True)
    captions, txt2img = torch.tensor([[1.0, 0], [0, 1], [0.6, 0.8]]), torch.tensor([0, 0, 1])
    for projection, value, slope in [
        (None, -1.18, [[-0.5, -0.5], [-0.3, -0.4]]),
        (P, -0.64, [[0, -0.5], [0, -0.4]]),
    ]:
        loss = similarity_loss(images, caption_targets(captions, txt2img, 2, projection))
        assert loss.item() == pytest.approx(value, abs=1e-6)
        (gradient,) = torch.autograd.grad(loss, images)
        torch.testing.assert_close(gradient, torch.tensor(slope), atol=1e-6, rtol=0)


def test_a_corpus_that_leaves_a_direction_unused():
    corpus = torch.tensor([[1.0, 0, 0], [0, 1, 0], [1, 0, 0]])
    for mode, kept in [("drop_top", [0, 1, 1]), ("span", [1, 1, 0])]:
        P = semantic_projection(corpus, mode)
        torch.testing.assert_close(P.matrix(), torch.diag(torch.tensor(kept, dtype=torch.float64)))
        loss = similarity_loss(torch.eye(3), caption_targets(torch.eye(3), [0, 1, 2], 3, P))
        assert loss.item() == pytest.approx(-2 / 3, abs=1e-6)


@settings(max_examples=40)
@given(
    st.integers(2, 40), st.integers(2, 24), st.sampled_from(["drop_top", "span", "top_k", "none"]), st.integers(0, 99)
)
def test_is_a_projection_and_lies_on_either_side_of_the_product(N, D, mode, seed):
    corpus = features(N, D, seed)
    P = quietly(corpus, mode, rank=min(N, D) if mode == "top_k" else None)
    matrix = P.matrix()
    torch.testing.assert_close(matrix, matrix.T)
    torch.testing.assert_close(matrix @ matrix, matrix)
    assert matrix.trace().item() == pytest.approx(P.rank, abs=1e-6)
    if mode == "drop_top":
        assert P.rank == min(D, N) - 1
    x, g = features(5, D, seed + 1), features(5, D, seed + 2)
    owner = torch.arange(5)
    loss = similarity_loss(x, caption_targets(g, owner, 5, P))
    torch.testing.assert_close(similarity_loss(P.apply(x), caption_targets(g, owner, 5, None)), loss)
    torch.testing.assert_close(similarity_loss(P.apply(x), caption_targets(g, owner, 5, P)), loss)


@settings(max_examples=20)
@given(st.integers(2, 60), st.integers(2, 20), st.integers(0, 99))
def test_drop_top_is_what_the_singular_value_decomposition_says(N, D, seed):
    corpus = features(N, D, seed, common=1.0)
    U = torch.linalg.svd(corpus.double().T, full_matrices=False)[0]
    P = quietly(corpus)
    torch.testing.assert_close(P.matrix(), U[:, 1:] @ U[:, 1:].T, atol=1e-5, rtol=0)
    if N >= D:
        torch.testing.assert_close(
            P.matrix(), torch.eye(D, dtype=torch.float64) - torch.outer(U[:, 0], U[:, 0]), atol=1e-5, rtol=0
        )
        flipped = SemanticProjection(P.mode, P.rank, P.singular_values, -P.basis, N)
        torch.testing.assert_close(flipped.matrix(), P.matrix())


def test_span_counts_singular_values_that_a_gram_matrix_would_lose():
    generator = torch.Generator().manual_seed(0)
    U = torch.linalg.qr(torch.randn(50, 4, generator=generator, dtype=torch.float64))[0]
    V = torch.linalg.qr(torch.randn(6, 4, generator=generator, dtype=torch.float64))[0]
    corpus = (U * torch.tensor([1, 1e-3, 1e-6, 1e-10], dtype=torch.float64)) @ V.T
    for tol, rank in [(1e-5, 2), (1e-8, 3), (1e-12, 4)]:
        assert quietly(corpus, "span", rank_tol=tol).rank == rank
    torch.testing.assert_close(quietly(corpus, "span", rank_tol=1e-12).matrix(), V @ V.T, atol=1e-4, rtol=0)


def test_span_of_few_texts_keeps_them_as_they_are():
    corpus = features(5, 16, 0)
    P = quietly(corpus, "span")
    assert P.rank == 5
    torch.testing.assert_close(P.apply(corpus), corpus)


def test_top_k_keeps_the_first_directions_and_30_by_default():
    corpus = features(80, 40, 3)
    U = torch.linalg.svd(corpus.double().T, full_matrices=False)[0]
    torch.testing.assert_close(quietly(corpus, "top_k", rank=7).matrix(), U[:, :7] @ U[:, :7].T)
    assert quietly(corpus, "top_k").rank == 30


def test_features_keep_their_type():
    P = quietly(features(20, 8, 0))
    assert P.apply(torch.ones(2, 8, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize("mode", ["drop_top", "span", "top_k", "none"])
@pytest.mark.parametrize("N", [12, 5])
def test_survives_a_safetensors_file(mode, N, tmp_path):
    P = quietly(features(N, 8, 0), mode, rank=3 if mode == "top_k" else None)
    save_file(P.state_dict(), tmp_path / "projection.safetensors")
    again = SemanticProjection.from_state_dict(load_file(tmp_path / "projection.safetensors"))
    assert (again.mode, again.rank, again.num_texts, again.rho_1) == (P.mode, P.rank, N, P.rho_1)
    g = features(4, 8, 1)
    assert torch.equal(again.apply(g), P.apply(g))


def test_texts_that_repeat_add_no_arbitrary_direction():
    texts = features(5, 16, 0, common=2.0)
    with pytest.warns(UserWarning, match="5 texts span no 16"):
        once = semantic_projection(texts)
    with pytest.warns(UserWarning, match="10 texts span no 16 dimensions; drop_top keeps 4 directions"):
        twice = semantic_projection(texts.repeat(2, 1))
    torch.testing.assert_close(once.matrix(), twice.matrix())


def test_warns_where_texts_share_no_direction_or_are_few():
    with pytest.warns(UserWarning, match="share no direction"):
        semantic_projection(features(200, 16, 0))
    with pytest.warns(UserWarning, match="drop_top keeps 9 directions"):
        semantic_projection(features(10, 16, 0, common=2.0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert semantic_projection(features(200, 16, 0, common=2.0)).rho_1 > 0.3
        semantic_projection(features(10, 16, 0), "none")


@pytest.mark.parametrize(
    ("corpus", "options", "message"),
    [
        (torch.ones(1, 4), {}, "at least 2 texts"),
        (torch.ones(4), {}, "at least 2 texts"),
        (torch.full((4, 4), float("nan")), {}, "finite"),
        (torch.zeros(4, 4), {}, "not all zero"),
        (torch.eye(4), {"mode": "first"}, "drop_top, span"),
        (torch.eye(4), {"rank": 2}, "top_k"),
        (torch.eye(4), {"mode": "top_k", "rank": 5}, "1 to 4"),
        (torch.eye(4), {"mode": "top_k", "rank": 0}, "1 to 4"),
        (torch.eye(4), {"mode": "span", "rank_tol": 1.0}, "rank_tol"),
        (torch.eye(4)[[0, 0, 0]], {}, "the 3 texts of the corpus are all alike"),
    ],
)
def test_says_what_is_wrong(corpus, options, message):
    with pytest.raises(ValueError, match=message):
        semantic_projection(corpus, **options)


@pytest.mark.parametrize(("count", "drawn"), [(5000, 2000), (25_010, 10_004)])
def test_corpus_is_drawn_without_replacement(count, drawn):
    captions = [f"caption {i}" for i in range(count)]
    corpus = draw_corpus(captions, 0.4, torch.Generator().manual_seed(0))
    assert len(set(corpus)) == len(corpus) == drawn
    assert set(corpus) <= set(captions)
    assert corpus == draw_corpus(captions, 0.4, torch.Generator().manual_seed(0))
    assert corpus != draw_corpus(captions, 0.4, torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("count", "fraction"), [(10, 0.0), (10, 1.1), (4, 0.4)])
def test_corpus_needs_two_captions(count, fraction):
    with pytest.raises(ValueError, match="fraction"):
        draw_corpus(["a"] * count, fraction, torch.Generator())
