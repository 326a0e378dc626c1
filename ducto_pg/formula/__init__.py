"""The formula language: text -> checked tree of sqlglot's nodes (`dialect`, `language`) -> SQL (`generator`) or Decimal
(`arithmetic`)."""
