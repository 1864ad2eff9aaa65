"""Reinforcement learning: rollouts, their scores, and updates of the policy on them."""
