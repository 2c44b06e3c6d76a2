"""The OpenAI protocol: schemas, conversion, server-sent events, errors, keys. No Ray in here."""
