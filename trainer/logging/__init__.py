"""The run's log: `log.RunLog` writes every number once, `history.read` reads it back."""
