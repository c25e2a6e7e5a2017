"""What LoFiT is compared with: `train.py --method lora|red|bias|iti|repe`, in the same harness."""
