import pytest
import torch

from xtuner.models import SIZES, build_model
from xtuner.nn.kv_cache import KVCache


@pytest.mark.parametrize("name", ["qwen3-moe-tiny", "llama-tiny", "deepseek-v3-tiny"])
def test_decoding_step_by_step_equals_the_whole_text(name):
    cfg = SIZES[name]
    model = build_model(cfg)
    model.init_weights(seed=1)
    lengths = (9, 4)
    ids = torch.randint(0, cfg.vocab_size, (sum(lengths),), generator=torch.Generator().manual_seed(2))
    texts = ids.split(lengths)
    prefill = [6, 1]
    expected = []
    for text in texts:
        n = len(text)
        expected.append(model(text, torch.arange(n)[None], torch.tensor([0, n], dtype=torch.int32), n).logits)
    cache = KVCache(cfg, 2, 9, torch.float32, "cpu")
    done, sizes = [0, 0], prefill
    while True:
        new = [text[d : d + n] for text, d, n in zip(texts, done, sizes, strict=True)]
        positions = torch.cat([torch.arange(d, d + n) for d, n in zip(done, sizes, strict=True)])[None]
        cu = torch.tensor([0, sizes[0], sum(sizes)], dtype=torch.int32)
        logits = model(torch.cat(new), positions, cu, max(sizes), cache=cache).logits.split(sizes)
        for s in range(2):
            torch.testing.assert_close(logits[s], expected[s][done[s] : done[s] + sizes[s]], rtol=1e-4, atol=1e-4)
        done = [d + n for d, n in zip(done, sizes, strict=True)]
        if done == [9, 4]:
            break
        sizes = [1, 1]
    assert cache.lengths == [9, 4]
    with pytest.raises(ValueError, match="max_length=9 of the KV cache is exceeded: 10 tokens"):
        model(torch.tensor([1, 1]), torch.tensor([[9, 4]]), torch.tensor([0, 1, 2], dtype=torch.int32), 1, cache=cache)


def test_latent_attention_keeps_no_heads():
    cfg = SIZES["deepseek-v3-tiny"]
    kept = [store.shape[3:].numel() for store in KVCache(cfg, 1, 1, torch.float32, "cpu").stores]
    assert kept == [cfg.mla.kv_lora_rank, cfg.mla.qk_rope_head_dim]
