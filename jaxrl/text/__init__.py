"""Text and tokens: the tokenizer, the chat form, and the calls read from what the policy wrote."""
