"""Log-softmax over a vocabulary that one rank holds (`statistics`) or several share (`shards`, `sharded_logits`)."""
