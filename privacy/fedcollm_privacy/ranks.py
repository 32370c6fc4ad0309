"""Sites of different LoRA ranks in one secure sum: whose updates reach where, and when that would tell on a site.

A site of rank s sends zeros beyond the first s components of every tensor. There the sum holds only the sites of
higher rank, so the least cohort must hold for every component by itself: of four sites, one of rank 8 and three of
rank 4, the opened sum would hold the first site's own update in the components 5 to 8.
"""

from __future__ import annotations

from collections.abc import Iterable

from fedcollm_privacy.messages import RoundPlan

__all__ = ["exposed_sites", "rank_of"]


def rank_of(plan: RoundPlan, site: str) -> int | None:
    """The rank of a site's adapter; None where it is the plan's own, the highest."""
    return dict(zip(plan.narrow_sites, plan.narrow_ranks, strict=True)).get(site)


def exposed_sites(plan: RoundPlan, sites: Iterable[str]) -> tuple[str, ...]:
    """The fewest sites, highest ranks first, without which every component is a sum of at least k sites or of none.

    Of fewer than k sites all are named. Where all have one rank nobody is: the round's own count is the rule then.
    """
    if not plan.narrow_sites:
        return ()
    narrow = dict(zip(plan.narrow_sites, plan.narrow_ranks, strict=True))
    left = {site: narrow.get(site, float("inf")) for site in sites}
    out: list[str] = []
    for rank in sorted(set(left.values()), reverse=True):
        reaching = [site for site in left if left[site] >= rank]
        if len(reaching) >= plan.min_contributors:
            break  # components below have these sites and more
        out += reaching
        left = {site: own for site, own in left.items() if site not in reaching}
    return tuple(sorted(out))
