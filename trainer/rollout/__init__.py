"""Rollouts: prompts in, what the policy wrote and what it was worth out. No algorithm and no layout is known here."""
