"""One row for each token and rank, instead of one for each choice, both ways: less traffic, other rounding.

A rank adds up the results of its own experts for a token before they travel, so sums are taken expert by expert on each
rank, then rank by rank: the same bits in every run of one layout, but not those of another. Likewise gradients.

Legend: W ranks, E experts of all of them, T tokens of this rank, K choices per token, R rows of this rank's experts,
P pairs of a rank's token with this rank, S choices of this rank.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from xtuner import ops
from xtuner.parallel.dispatch import Dispatcher, exchange_rows, rows_between_ranks


class PresumPlan(NamedTuple):
    """Rows and pairs to send to each rank and to receive from it, and who is in which row.

    choice_S             the choices of this rank by (expert, token)
    pair_map             row_of [T, W] and src: this rank's tokens to its pairs with other ranks
    row_map              row_of [P, K] and src [R]: pairs that come here to the rows of this rank's experts
    place_R              where in row_of [P, K] the weight belongs that travels with a choice
    """

    send: list[int]
    receive: list[int]
    send_pairs: list[int]
    receive_pairs: list[int]
    choice_S: Tensor
    pair_map: tuple[Tensor, Tensor]
    row_map: tuple[Tensor, Tensor]
    place_R: Tensor
    offsets: Tensor
    rows_WW: Tensor


class PresumRows(NamedTuple):
    x: Tensor
    offsets: Tensor
    plan: PresumPlan
    maps: None = None
    group: None = None


class PresumDispatcher(Dispatcher):
    """torch's all-to-all with one row per token and rank, in exact mode. Arguments as for `Dispatcher`."""

    def combine(self, y_RD: Tensor, dispatched: PresumRows, weights_TK: Tensor) -> Tensor:
        plan = dispatched.plan
        travelling = weights_TK.flatten()[plan.choice_S][:, None]
        weights_R = exchange_rows(travelling, plan.send, plan.receive, self.process_group)[:, 0]
        row_of, src = plan.row_map
        weights_PK = weights_R.new_zeros(row_of.numel()).scatter(0, plan.place_R, weights_R).view_as(row_of)
        sums_PD = ops.unpermute(y_RD, row_of, src, weights_PK)
        sums = exchange_rows(sums_PD, plan.receive_pairs, plan.send_pairs, self.process_group)
        return ops.unpermute(sums, *plan.pair_map)

    def _send(self, x_TD: Tensor, plan: PresumPlan) -> PresumRows:
        pairs = ops.permute(x_TD, *plan.pair_map)
        pairs_PD = exchange_rows(pairs, plan.send_pairs, plan.receive_pairs, self.process_group)
        return PresumRows(ops.permute(pairs_PD, *plan.row_map), plan.offsets, plan)

    def _plan(self, topk_idx_TK: Tensor, num_experts: int) -> PresumPlan:
        world, (num_tokens, k) = self.world_size, topk_idx_TK.shape
        counts_E, _, _, src = ops.route_map(topk_idx_TK, num_experts)
        rank_TK = torch.where(topk_idx_TK < 0, world, topk_idx_TK.long() * world // num_experts)
        meets_TW = torch.zeros(num_tokens, world + 1, dtype=torch.int32, device=src.device)
        meets_TW = meets_TW.scatter_(1, rank_TK, 1)[:, :world]
        loads = src.new_empty(world, num_experts + world)
        dist.all_gather(list(loads), torch.cat([counts_E, meets_TW.sum(0).int()]), group=self.process_group)
        counts_WE, pairs_WW = loads[:, :num_experts], loads[:, num_experts:].cpu()
        rows_WW = rows_between_ranks(counts_WE)
        send, receive = rows_WW[self.rank].tolist(), rows_WW[:, self.rank].tolist()
        send_pairs, receive_pairs = pairs_WW[self.rank].tolist(), pairs_WW[:, self.rank].tolist()

        # Pairs are numbered by (rank, token); each choice tells its expert's rank its number among those of the two.
        number_TW = meets_TW.cumsum(0).int() - 1
        pair_of = torch.where(meets_TW > 0, number_TW + _starts(send_pairs, src.device), -1).int()
        token_W = torch.nonzero(meets_TW.t())  # by rank, then token
        pair_src = (token_W[:, 1] * world + token_W[:, 0]).int()
        choice_S = src[: sum(send)].long()
        told = number_TW[choice_S // k, rank_TK.flatten()[choice_S]][:, None]
        pair_R = exchange_rows(told, send, receive, self.process_group)[:, 0].long()
        source_R = torch.arange(world, device=src.device).repeat_interleave(torch.tensor(receive, device=src.device))
        pair_R += _starts(receive_pairs, src.device)[source_R]

        here = num_experts // world
        arriving = counts_WE.reshape(world, world, here)[:, self.rank].flatten()
        expert_R = torch.arange(here, device=src.device).repeat(world)
        expert_R = expert_R.repeat_interleave(arriving, output_size=sum(receive))
        _, offsets, row_R, _ = ops.route_map(expert_R[:, None], here)
        num_pairs = sum(receive_pairs)
        _, first_of, sorted_R, _ = ops.route_map(pair_R[:, None], max(1, num_pairs))
        place_R = pair_R * k + sorted_R[:, 0] - first_of[pair_R]  # the choices of a pair in the order of their experts
        row_of = row_R.new_full((num_pairs * k,), -1).scatter(0, place_R, row_R[:, 0]).view(num_pairs, k)
        row_src = row_R.new_empty(sum(receive)).scatter(0, row_R[:, 0].long(), place_R.int())
        return PresumPlan(
            send, receive, send_pairs, receive_pairs, choice_S, (pair_of, pair_src), (row_of, row_src), place_R,
            offsets, rows_WW,
        )  # fmt: skip


def _starts(sizes: list[int], device: torch.device) -> Tensor:
    """Where each of neighbouring blocks of these sizes begins."""
    ends = torch.tensor(sizes, device=device).cumsum(0)
    return ends - torch.tensor(sizes, device=device)
