"""What tokens cost, by the public prices of providers. Money is an integer of millionths of a US dollar.

The prices come with the package genai-prices, and nothing is fetched (https://github.com/pydantic/genai-prices).
"""

from __future__ import annotations


def price_microusd(model: str, base_url: str, prompt_tokens: int, completion_tokens: int) -> int | None:
    """What so many tokens of a model cost at the provider that has this address; None where no price is known.

    The first call takes some 0.4 s, for it reads all prices; later ones 0.2 ms.
    """
    # Importing it reads the prices as well, and takes 25 MB: most servers are never asked for money.
    from genai_prices import Usage, calc_price

    usage = Usage(input_tokens=prompt_tokens, output_tokens=completion_tokens)
    try:
        price = calc_price(usage, model_ref=model, provider_api_url=base_url)
    except LookupError:
        return None
    return int((price.total_price * 1_000_000).to_integral_value())
