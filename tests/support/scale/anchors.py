"""What was published for real clusters, and what the same simulation plays for others' policies. Constants only."""

from __future__ import annotations

PUBLISHED = (
    ("ByteRobust, 9,600 GPUs, three months", "97 %", "arXiv 2509.16293"),
    ("Llama 3, 16,384 GPUs, 54 days", "> 90 %", "arXiv 2407.21783"),
)
"""Cluster, share of the time that counted, source."""
