"""Loading, the policy's forward pass, heads for values and rewards, and saving in the Hugging Face layout."""
