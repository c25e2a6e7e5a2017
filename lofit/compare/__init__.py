"""What LoFiT is compared with: other ways to choose heads, other methods of fine-tuning."""
