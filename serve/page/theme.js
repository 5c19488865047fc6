// The colours of the page: as the system has them, or as they were chosen here.

import { iconButton } from "./element.js";
import { loadTheme, saveTheme } from "./store.js";

const NAMES = { auto: "as the system", light: "light", dark: "dark" };
const THEMES = Object.keys(NAMES);

/** Puts the button that goes from one to the next in an element's place. */
export function placeTheme(place) {
  const show = (theme) => {
    document.documentElement.dataset.theme = theme;
    const next = THEMES[(THEMES.indexOf(theme) + 1) % THEMES.length];
    const choose = () => {
      saveTheme(next);
      show(next);
      place.focus();
    };
    const button = iconButton(theme, `Colours: ${NAMES[theme]}; press for ${NAMES[next]}`, choose, { id: "theme" });
    place.replaceWith(button);
    place = button;
  };
  const kept = loadTheme();
  show(THEMES.includes(kept) ? kept : "auto");
}
