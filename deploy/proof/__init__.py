"""The product at work in the lab: deploys it with the demo, looks at it from outside, and proves what it promises."""
