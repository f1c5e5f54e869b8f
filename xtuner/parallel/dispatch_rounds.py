"""How a layer's tokens are cut into rounds, so that no rank ever holds more than a given number of rows.

Legend: W ranks, T tokens of this rank, K choices per token, R rows of a rank at a time.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from xtuner.ops import OpError


def cut_into_rounds(
    topk_idx_TK: Tensor, rows_WW: Tensor, max_rows: int, num_experts: int, group: dist.ProcessGroup | None
) -> list[int]:
    """Tokens of this rank in each round: neighbours in their order, and as many rounds on every rank. Collective.

    Each rank may send so many rows to each other in a round that at most R come together anywhere: K, and of what is
    left a share like its share of the whole. Where R does not hold one token of every rank, ranks take turns.

    Args:
        topk_idx_TK: expert of each choice; -1 where dropped.
        rows_WW: rows that each rank has for each rank, the same on all.

    Raises:
        OpError: R is below the K rows of one token.
    """
    world, rank, k = rows_WW.shape[0], dist.get_rank(group), topk_idx_TK.shape[1]
    if max_rows < k:
        raise OpError(f"dispatch: max_rows={max_rows} must hold the num_experts_per_tok={k} rows of one token")
    at_once = min(world, max_rows // k)
    turn, first = rank // at_once, rank // at_once * at_once
    quota_W = _quotas(rows_WW[first : first + at_once].cpu(), max_rows, k)[rank - first]
    mine = _slices(_rows_of_tokens(topk_idx_TK.cpu(), world, num_experts), quota_W)
    num_turns = -(-world // at_once)
    rounds = torch.zeros(num_turns, dtype=torch.int64, device=topk_idx_TK.device)
    rounds[turn] = len(mine)
    dist.all_reduce(rounds, dist.ReduceOp.MAX, group=group)
    before, within, after = (int(part.sum()) for part in rounds.split([turn, 1, num_turns - turn - 1]))
    return [0] * before + mine + [0] * (within - len(mine)) + [0] * after


def _quotas(rows_SW: Tensor, max_rows: int, k: int) -> Tensor:
    """Rows that each source may send to each rank in a round; they add up to no more than `max_rows`."""
    sources_W, total_W = (rows_SW > 0).sum(0), rows_SW.sum(0).clamp_min(1)
    return k + (max_rows - k * sources_W) * rows_SW.long() // total_W


def _rows_of_tokens(topk_idx_TK: Tensor, world: int, num_experts: int) -> Tensor:
    """[T, W]: rows that a token has on each rank."""
    rank_TK = torch.where(topk_idx_TK < 0, world, topk_idx_TK.long() * world // num_experts)
    rows = torch.zeros(topk_idx_TK.shape[0], world + 1, dtype=torch.int64)
    return rows.scatter_add_(1, rank_TK, torch.ones_like(rank_TK))[:, :world]


def _slices(rows_TW: Tensor, quota_W: Tensor) -> list[int]:
    """Lengths of the longest slices, from the first token on, whose rows stay within the quota on every rank."""
    up_to_WT = rows_TW.cumsum(0).t().contiguous()
    sizes, begin, sent_W = [], 0, torch.zeros_like(quota_W)
    while begin < rows_TW.shape[0]:
        end = int(torch.searchsorted(up_to_WT, (sent_W + quota_W)[:, None], right=True).min())
        sizes.append(end - begin)
        begin, sent_W = end, up_to_WT[:, end - 1].clone()
    return sizes
