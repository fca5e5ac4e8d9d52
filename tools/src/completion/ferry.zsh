#compdef @NAMES@
# Completion of ferry for zsh; load it with: source <(ferry completion zsh)
_ferry() {
    local line
    local -a found
    for line in ${(f)"$(@FERRY@ complete -- "${(@)words[1,CURRENT]}" 2> /dev/null)"}; do
        if [[ $line == :files* ]]; then
            _files
            return
        fi
        found+=("${${line%%$'\t'*}//:/\\:}:${line#*$'\t'}")
    done
    _describe ferry found
}
if [[ $funcstack[1] == _ferry ]]; then
    _ferry "$@"
else
    compdef _ferry @NAMES@
fi
