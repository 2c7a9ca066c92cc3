"""Functions for `python -m lfm_mlx.chat --tools examples/weather_tools.py`."""

from lfm_mlx import tool


def get_weather(city: str) -> dict[str, str | int]:
    """Get the weather of a city.

    Args:
        city: The city.
    """
    return {"temperature": 18, "condition": "sunny", "city": city}


@tool(changes=True)
def set_alarm(time: str) -> str:
    """Set an alarm.

    Args:
        time: The time.
    """
    return f"The alarm is set for {time}."
