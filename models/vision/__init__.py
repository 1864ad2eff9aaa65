"""Models that see: a vision tower, a connector, and where its features stand among the tokens.

Legend besides that of docs/architecture.md: `P` patches of a micro-batch, all tiles one after another; `X` numbers of a
patch (colours x height x width); `I` features that the connector makes; `F` tokens that a feature stands for.
"""
