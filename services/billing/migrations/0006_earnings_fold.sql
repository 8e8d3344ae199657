-- Replay folds the earnings itself, from the events that it has checked: nothing asks SQL again.
DROP VIEW ledger.earnings_again;
