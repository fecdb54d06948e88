"""One module per verb or small group of verbs: parse, call, and return a Result. Heavy imports stay inside."""
