"""The simulated exchanges: one file per venue beside the shared market, server, faults and ledger."""
