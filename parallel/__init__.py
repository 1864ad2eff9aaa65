"""Where the model runs: sharding record, collectives, parallel layers, linear cross-entropy, process groups, engine."""
