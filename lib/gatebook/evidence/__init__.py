"""Claims, rules, verdicts and the ledger of recorded evidence."""
