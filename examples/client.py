"""Ask a running agent (`remora-agent serve BUNDLE --adapter support=DIR`) three ways."""

from remora_agent.client import Client

with Client("127.0.0.1:7450") as client:
    question = [{"role": "user", "content": "My parcel is late."}]
    print(client.generate(messages=question).text)
    answer = client.generate(messages=question, adapter="support", max_tokens=100)
    print(answer.text, answer.provenance.adapters[0].digest)
    for delta in client.stream(messages=question, adapter={"support": 0.5}, temperature=0.7):
        print(delta.text, end="", flush=True)
