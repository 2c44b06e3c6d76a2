"""How tokens get made: schedule, draft, flush, accept. Plain Python, no Ray, no HTTP."""
