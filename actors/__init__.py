"""Environments and what steps them: vector environments, rollouts, evaluation."""
