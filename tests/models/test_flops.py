"""FLOPs against a hand count, and against upstream's formula."""

from __future__ import annotations

from tandem.models.flops import training_flops
from toys import toy_config


def test_against_a_count_by_hand() -> None:
    config = toy_config(
        num_layers=1,
        hidden_size=4,
        ffn_hidden_size=8,
        num_attention_heads=2,
        num_query_groups=1,
        kv_channels=6,
        vocab_size=10,
    )
    tokens = 5 + 3
    q, kv, o = 2 * 4 * 12, 2 * 4 * 12, 2 * 12 * 4  # multiply-adds of one token, times two
    mlp, head = 3 * 2 * 4 * 8, 2 * 4 * 10
    scores_and_values = 2 * (2 * 12)  # for one query-key pair, all heads
    pairs = (25 + 9) / 2
    assert training_flops(config, [5, 3]) == 3 * (tokens * (q + kv + o + mlp + head) + pairs * scores_and_values)


def test_against_upstreams_formula() -> None:
    layers, hidden, ffn, heads, groups, head, vocab, seq = 28, 1024, 3072, 16, 8, 128, 151936, 4096
    config = toy_config(
        num_layers=layers,
        hidden_size=hidden,
        ffn_hidden_size=ffn,
        num_attention_heads=heads,
        num_query_groups=groups,
        kv_channels=head,
        vocab_size=vocab,
    )
    attention = (1 + groups / heads + seq / hidden * 0.5) * (head * heads / hidden)
    upstream = seq * (12 * layers * hidden * ffn * 1.5 + 12 * layers * hidden**2 * attention + 6 * hidden * vocab)
    # upstream counts the sequence's share of attention as S / h * r inside the bracket that is scaled by heads
    assert abs(training_flops(config, [seq]) / upstream - 1) < 1e-9
